// The page's files, and calls of the worker, which decodes images and runs models.

// A worker of a blob has this page's Content-Security-Policy; one of a file would have none.
const source = `import "${new URL("worker.js", import.meta.url)}";`;
const address = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
const worker = new Worker(address, { type: "module" });
const waiting = new Map(); // id -> {resolve, reject}
let number = 0;
let failure = null;

worker.onmessage = ({ data: { id, result, error } }) => {
  const { resolve, reject } = waiting.get(id);
  waiting.delete(id);
  if (error === undefined) resolve(result);
  else reject(new Error(error));
};

// A file of the page is missing, or the browser is too old for one.
worker.onerror = (event) => {
  event.preventDefault();
  failure = new Error(event.message || "worker.js or a file that it imports is missing, or this browser is too old");
  for (const { reject } of waiting.values()) reject(failure);
  waiting.clear();
};

/** Send a task of worker.js. The promise of its result fails with an Error of one line. */
export function ask(task, options, transfer = []) {
  return new Promise((resolve, reject) => {
    if (failure) return reject(failure);
    number += 1;
    waiting.set(number, { resolve, reject });
    worker.postMessage({ id: number, task, ...options }, transfer);
  });
}

/** A response with a file of the page's folder. */
export async function fetchFile(name) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name}: ${response.status} ${response.statusText}`);
  return response;
}

/** The bytes of a file. `report` is called with their number and, if known, share of all so far. */
export async function download(name, report) {
  const response = await fetchFile(name);
  const total = Number(response.headers.get("content-length"));
  const parts = [];
  let size = 0;
  const reader = response.body.getReader();
  for (let part; !(part = await reader.read()).done; ) {
    parts.push(part.value);
    size += part.value.length;
    report(size, total ? size / total : 0);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}
