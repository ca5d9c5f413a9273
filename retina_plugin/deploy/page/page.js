// What a user sees. Models run in worker.js.

import { ask, download, fetchFile } from "./client.js";
import { toCoco } from "./model.js";

const $ = (selector) => document.querySelector(selector);
const main = $("main");
const models = []; // {key, name, metadata, panel, found}, one or two
let picture = null; // {name, width, height}
const hiddenClasses = new Set(); // names
let lastKey = 0;
let asked = 0; // pictures so far: only the last one is shown

// ---- models -------------------------------------------------------------------------------------

async function start() {
  $("#unserved").hidden = true;
  main.hidden = false;
  main.classList.add("empty");
  try {
    const list = await (await fetchFile("models.json")).json();
    for (const [i, { file, name }] of list.entries()) {
      const what = list.length > 1 ? `model ${i + 1} of ${list.length}` : "the model";
      const bytes = await download(file, (size, share) => {
        if (share) $("#loading").value = share;
        status(`Loading ${what}: ${(size / 1e6).toFixed(1)} MB`);
      });
      $("#loading").removeAttribute("value");
      status(`Preparing ${what}…`);
      await addModel(name, bytes);
    }
    status("");
  } catch (error) {
    fail(`The model cannot be loaded: ${error.message}`);
    status("Drop a model, a file of retina export, to begin");
  }
  $("#loading").hidden = true;
}

async function addModel(name, bytes) {
  const key = (lastKey += 1);
  const { metadata, milliseconds } = await ask("load", { key, bytes }, [bytes.buffer]);
  if (models.length === 2) await removeModel(models[1]);
  const model = { key, name, metadata, loading: milliseconds, panel: newPanel(), found: null };
  models.push(model);
  model.panel.querySelector("b").textContent = name;
  model.panel.querySelector(".badge").textContent = metadata.quantized;
  model.panel.querySelector(".badge").hidden = !metadata.quantized;
  model.panel.querySelector(".save").onclick = () => save(model);
  model.panel.querySelector(".close").onclick = () => removeModel(model);
  $("#panels").append(model.panel);
  describe();
  return model;
}

async function removeModel(model) {
  models.splice(models.indexOf(model), 1);
  model.panel.remove();
  describe();
  listClasses();
  update();
  await ask("unload", { key: model.key });
}

function describe() {
  $("#about").textContent = models
    .map(({ name, metadata: m }) => `${name}: ${m.class_names.length} classes, short side ${m.min_size || "as it is"}${m.min_size ? " px" : ""}`)
    .join(" · ") || "RetinaNet in this browser";
  const lowest = Math.min(...models.map((m) => m.metadata.score_thresh), 1);
  $("#score").min = models.length ? Math.floor(lowest * 100) / 100 : 0;
  for (const { panel } of models) panel.querySelector(".close").hidden = models.length < 2;
}

function newPanel() {
  const panel = document.createElement("figure");
  panel.innerHTML = `<figcaption><div><b></b> <span class="badge"></span><p class="facts">&nbsp;</p></div>
    <button class="save button" type="button">Save JSON</button>
    <button class="close" type="button" aria-label="Remove this model">✕</button></figcaption>
    <div class="frame"><div class="picture"><canvas role="img"></canvas><ol class="boxes"></ol></div></div>`;
  return panel;
}

// ---- pictures -----------------------------------------------------------------------------------

async function show(blob) {
  const turn = ++asked;
  clearError();
  if (models.length === 0) return fail("There is no model yet");
  const name = blob.name || "picture.png";
  let decoded;
  try {
    decoded = await ask("decode", { blob });
  } catch (error) {
    return fail(`${name} cannot be read: ${error.message}`);
  }
  if (turn !== asked) return;
  picture = { name, width: decoded.width, height: decoded.height, bitmap: decoded.bitmap };
  main.classList.remove("empty");
  for (const model of models) {
    model.found = null;
    draw(model);
  }
  for (const model of [...models]) {
    if (turn === asked && models.includes(model)) await detect(model, turn); // or it was closed
  }
}

function draw(model) {
  const { width, height, bitmap, name } = picture;
  const canvas = model.panel.querySelector("canvas");
  canvas.width = width;
  canvas.height = height;
  canvas.setAttribute("aria-label", name);
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  // as large as it fits, also a small picture
  const frame = model.panel.querySelector(".picture").style;
  frame.maxWidth = `max(12rem, calc((100vh - 13rem) * ${width / height}))`;
  model.panel.classList.add("busy");
  model.panel.querySelector(".facts").textContent = "detecting…";
  model.panel.querySelector(".boxes").replaceChildren();
  model.panel.querySelector(".save").disabled = true;
}

async function detect(model, turn) {
  try {
    const result = await ask("detect", { key: model.key });
    if (turn !== asked) return;
    Object.assign(model, result);
    model.panel.querySelector(".save").disabled = false;
  } catch (error) {
    if (turn !== asked) return;
    model.found = null;
    model.panel.querySelector(".facts").textContent = "failed";
    fail(`${model.name} cannot detect in ${picture.name}: ${error.message}`);
  }
  model.panel.classList.remove("busy");
  listClasses();
  update();
}

const isShown = (model, { score, classId }) =>
  score >= Number($("#score").value) && !hiddenClasses.has(model.metadata.class_names[classId]);

/** Draw the boxes that the filters let pass, and count them. */
function update() {
  const least = Number($("#score").value);
  $("#score-value").textContent = least.toFixed(2);
  const counts = []; // of each model: class name -> number
  const said = [];
  for (const model of models) {
    if (model.found === null) continue;
    const { class_names: names } = model.metadata;
    const ofModel = new Map();
    for (const { score, classId } of model.found) {
      if (score >= least) ofModel.set(names[classId], (ofModel.get(names[classId]) ?? 0) + 1);
    }
    counts.push(ofModel);
    const shown = model.found.filter((found) => isShown(model, found));
    model.panel.querySelector(".boxes").replaceChildren(...shown.map((found, i) => newBox(found, names, shown.length - i)));
    const number = `${shown.length} ${shown.length === 1 ? "detection" : "detections"}`;
    model.panel.querySelector(".facts").textContent =
      `${number} · ${model.milliseconds.toFixed(0)} ms at ${model.width} × ${model.height}`;
    said.push(models.length > 1 ? `${model.name}: ${number}` : number);
  }
  for (const item of $("#classes").children) {
    const numbers = counts.map((ofModel) => ofModel.get(item.dataset.name) ?? 0);
    item.querySelector(".count").textContent = numbers.join(" | ");
    item.classList.toggle("zero", !numbers.some(Boolean));
  }
  $("#announce").textContent = said.join(", ");
}

function newBox({ box, score, classId }, names, level) {
  const item = document.createElement("li");
  const label = document.createElement("span");
  const [left, top, right, bottom] = [0, 1, 2, 3].map((i) => (100 * box[i]) / (i % 2 ? picture.height : picture.width));
  item.className = `box${top < 6 ? " top" : ""}${left > 75 ? " end" : ""}`;
  item.dataset.score = score;
  Object.assign(item.style, { left: `${left}%`, top: `${top}%`, width: `${right - left}%`, height: `${bottom - top}%`, zIndex: level });
  item.style.setProperty("--colour", colour(names[classId]));
  label.textContent = `${names[classId]} ${score.toFixed(2)}`;
  item.append(label);
  return item;
}

// ---- classes ------------------------------------------------------------------------------------

const allNames = () => [...new Set(models.flatMap((model) => model.metadata.class_names))];

/** A class has the same colour in both models: neighbours are a golden ratio of the circle apart. */
const colour = (name) => `oklch(0.8 0.16 ${(60 + 222.492 * allNames().indexOf(name)) % 360})`;

function listClasses() {
  const found = new Set(models.flatMap((m) => (m.found ?? []).map(({ classId }) => m.metadata.class_names[classId])));
  const names = allNames();
  // of many classes those in the picture come first
  const sorted = names.length > 12 ? names.toSorted((a, b) => found.has(b) - found.has(a)) : names;
  $("#search").hidden = names.length <= 12;
  $("#classes").replaceChildren(...sorted.map(newClass));
  search();
}

function newClass(name) {
  const item = document.createElement("li");
  item.dataset.name = name;
  item.innerHTML = '<label><input type="checkbox"><i></i><span class="name"></span><span class="count"></span></label>';
  item.querySelector(".name").textContent = name;
  item.querySelector("i").style.setProperty("--colour", colour(name));
  const checkbox = item.querySelector("input");
  checkbox.checked = !hiddenClasses.has(name);
  checkbox.onchange = () => {
    if (checkbox.checked) hiddenClasses.delete(name);
    else hiddenClasses.add(name);
    update();
  };
  return item;
}

function setAll(checked) {
  for (const item of $("#classes").children) {
    if (item.hidden) continue;
    item.querySelector("input").checked = checked;
    if (checked) hiddenClasses.delete(item.dataset.name);
    else hiddenClasses.add(item.dataset.name);
  }
  update();
}

function search() {
  const text = $("#search").hidden ? "" : $("#search").value.toLowerCase();
  for (const item of $("#classes").children) item.hidden = !item.dataset.name.toLowerCase().includes(text);
}

// ---- the rest -----------------------------------------------------------------------------------

/** Offer the detections that are shown as a file: COCO's result list. */
function save(model) {
  const shown = model.found.filter((found) => isShown(model, found));
  const text = JSON.stringify(toCoco(shown, model.metadata, picture.name), null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = `${picture.name.replace(/\.[^.]*$/, "")}_${model.name}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

const status = (text) => ($("#status").textContent = text);

function fail(message) {
  $("#error p").textContent = message;
  $("#error").hidden = false;
}

const clearError = () => ($("#error").hidden = true);

/** Pictures and models, however they come. */
async function take(files) {
  const isModel = (file) => /\.onnx$/i.test(file.name);
  const model = [...files].find(isModel);
  const image = [...files].find((file) => !isModel(file));
  if (model) {
    clearError();
    try {
      const bytes = new Uint8Array(await model.arrayBuffer());
      const added = await addModel(model.name.replace(/\.onnx$/i, ""), bytes);
      if (picture && !image) {
        draw(added);
        await detect(added, asked);
      }
    } catch (error) {
      fail(`${model.name} cannot be used: ${error.message}`);
    }
  }
  if (image) await show(image);
}

for (const input of [$("#picture"), $("#picture-again"), $("#model")]) {
  input.onchange = () => {
    const files = [...input.files];
    input.value = ""; // so that the same file can be chosen again
    take(files);
  };
}
$("#score").value = 0.3; // as `retina predict`
$("#score").oninput = update;
$("#search").oninput = search;
$("#all").onclick = () => setAll(true);
$("#none").onclick = () => setAll(false);
$("#error button").onclick = clearError;
document.onpaste = (event) => {
  if (event.clipboardData.files.length) take(event.clipboardData.files);
};
document.ondragover = (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
};
document.ondragleave = (event) => {
  if (event.relatedTarget === null) document.body.classList.remove("dragging");
};
document.ondrop = (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  take(event.dataTransfer.files);
};

start();
