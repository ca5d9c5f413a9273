// Charts, the choice of a class, and sorting. Data: `figures` and `classes`, see charts.py.
"use strict";

const $ = (selector) => document.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const read = (id) => JSON.parse($(`#${id}`).textContent);
const figures = read("figure-data");
const classes = read("class-data");
const STEP = 12; // pictures of a kind at first, and more at a click

for (const chart of all(".chart")) {
  const figure = figures[chart.dataset.figure];
  Plotly.newPlot(chart, figure.data, figure.layout, {
    responsive: true,
    displayModeBar: false, // dragging zooms, a double click goes back
  });
  // a click on the bar of a class chooses it
  if (chart.dataset.figure === "classes") {
    chart.on("plotly_click", (event) => choose(String(event.points[0].customdata)));
  }
}

/** Show one class ("" is all of them) in the charts that can, in the tables and the gallery. */
function choose(value) {
  $("#class").value = value;
  const one = value === "" ? null : classes[Number(value)];
  const replace = (name, rows) => {
    const chart = $(`.chart[data-figure=${name}]`);
    if (!chart) return;
    const original = figures[name].data;
    rows.forEach((row, i) => {
      const y = row ?? original[i].y;
      const x = original[i].x;
      // a curve of many classes is thinned
      const step = Math.round((x.length - 1) / Math.max(1, y.length - 1)) || 1;
      Plotly.restyle(chart, { y: [y], x: [x.filter((_, k) => k % step === 0)] }, [i]);
    });
  };
  replace("sizes", [one?.sizes]);
  replace("ious", [one?.ious]);
  replace("curve", [0, 1, 2].map((i) => one?.curve[i]));
  replace("sweep", [0, 1, 2].map((i) => one?.sweep[i]));
  const sweep = $(".chart[data-figure=sweep]");
  if (sweep && figures.sweep.layout.shapes?.length) {
    const shape = figures.sweep.layout.shapes[0];
    const at = one ? one.threshold : shape.x0;
    const shown = at <= 1; // above 1: nothing of this class is shown
    Plotly.relayout(sweep, { shapes: shown ? [{ ...shape, x0: at, x1: at }] : [] });
  }
  for (const row of all("tr[data-classes]")) {
    const mine = value !== "" && row.dataset.classes.split(" ").includes(value);
    row.classList.toggle("chosen", mine && row.closest("table").id === "by-class");
    if (row.closest("table").id !== "by-class") row.hidden = value !== "" && !mine;
  }
  for (const title of all(".of-class")) title.textContent = value === "" ? "" : `: ${$("#class").selectedOptions[0].text}`;
  for (const list of all(".gallery")) {
    list.dataset.limit = STEP;
    list.value = value;
    showPictures(list);
  }
}

function showPictures(list) {
  const value = $("#class").value;
  const mine = all("li", list).filter((item) => (value === "" ? item.dataset.first === "1" : item.dataset.classes.split(" ").includes(value)));
  const limit = Number(list.dataset.limit);
  for (const item of all("li", list)) item.hidden = true;
  mine.slice(0, limit).forEach((item) => (item.hidden = false));
  const section = list.closest("section");
  section.querySelector(".more").hidden = mine.length <= limit;
  section.querySelector(".none").hidden = mine.length > 0;
}

for (const button of all(".more")) {
  button.onclick = () => {
    const list = button.closest("section").querySelector(".gallery");
    list.dataset.limit = Number(list.dataset.limit) + STEP;
    showPictures(list);
  };
}

/** Sort a table by a column: numbers from the largest at the first click, texts from A. */
function sort(heading) {
  const table = heading.closest("table");
  const column = [...heading.parentNode.children].indexOf(heading);
  const isNumber = heading.classList.contains("number");
  const before = heading.getAttribute("aria-sort");
  const ascending = before ? before === "descending" : !isNumber;
  const key = (row) => row.children[column].dataset.value ?? row.children[column].textContent;
  const compare = (a, b) => {
    if (!isNumber) return key(a).localeCompare(key(b), undefined, { numeric: true });
    const [x, y] = [Number.parseFloat(key(a)), Number.parseFloat(key(b))];
    return x - y;
  };
  const rows = all("tbody tr", table);
  const known = rows.filter((row) => !isNumber || !Number.isNaN(Number.parseFloat(key(row))));
  const unknown = rows.filter((row) => !known.includes(row)); // always last
  known.sort((a, b) => (ascending ? compare(a, b) : compare(b, a)));
  table.tBodies[0].append(...known, ...unknown);
  for (const other of all("th", table)) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
}

for (const heading of all("table.sortable th")) {
  const button = document.createElement("button");
  button.append(...heading.childNodes);
  button.type = "button";
  button.onclick = () => sort(heading);
  heading.append(button);
}

$("#class").onchange = () => choose($("#class").value);
choose("");
