// Decodes images and runs models, so that the page stays responsive.
//
// Messages: {id, task, ...} -> {id, result} or {id, error}, one after the other.

import * as ort from "./ort.wasm.min.mjs";
import { readMetadata, toDetections, toInput } from "./model.js";
import { decodePng, isPng, opaqueRgb } from "./pixels.js";

ort.env.wasm.numThreads = 1; // more need HTTP headers that a plain file server does not send

const models = new Map(); // key -> {session, metadata}
let image = null;

const tasks = {
  /** Load the bytes of a model under a key. */
  async load({ key, bytes }) {
    const metadata = readMetadata(bytes);
    const start = performance.now();
    const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
    await models.get(key)?.session.release();
    models.set(key, { session, metadata });
    return { metadata, milliseconds: performance.now() - start };
  },

  async unload({ key }) {
    await models.get(key)?.session.release();
    models.delete(key);
  },

  /** Decode a picture, which the next detections are made in. */
  async decode({ blob }) {
    const { width, height, data } = await decode(blob);
    const pixels = new Uint8ClampedArray(4 * width * height).fill(255);
    for (let i = 0, n = width * height; i < n; i++) {
      for (let c = 0; c < 3; c++) pixels[4 * i + c] = data[3 * i + c];
    }
    const bitmap = await createImageBitmap(new ImageData(pixels, width, height));
    image = { width, height, data }; // only now: after one that cannot be read, the last one stays
    return { width, height, bitmap };
  },

  /** Detect in the decoded picture with the model of a key. */
  async detect({ key }) {
    const { session, metadata } = models.get(key);
    const input = toInput(image, metadata);
    const start = performance.now();
    const tensor = new ort.Tensor("float32", input.data, [1, 3, input.height, input.width]);
    const { boxes, scores, classes } = await session.run({ image: tensor });
    const milliseconds = performance.now() - start;
    const found = toDetections(boxes.data, scores.data, classes.data, image, input, metadata);
    return { found, milliseconds, width: input.width, height: input.height };
  },
};

async function decode(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  if (isPng(bytes)) return decodePng(bytes);
  let bitmap;
  try {
    const asStored = { colorSpaceConversion: "none", premultiplyAlpha: "none", imageOrientation: "from-image" };
    bitmap = await createImageBitmap(blob, asStored);
  } catch {
    throw new Error("it is no image, or of a kind that this browser cannot read");
  }
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  return { width, height, data: opaqueRgb(context.getImageData(0, 0, width, height).data) };
}

let queue = Promise.resolve();
self.onmessage = ({ data: { id, task, ...options } }) => {
  queue = queue.then(async () => {
    try {
      const result = await tasks[task](options);
      self.postMessage({ id, result }, result?.bitmap ? [result.bitmap] : []);
    } catch (error) {
      self.postMessage({ id, error: String(error?.message ?? error).split("\n")[0] });
    }
  });
};
