// What a file of `retina export` says of itself, and what stands before and behind its graph.

import { resize, resizeWithoutAntialias } from "./pixels.js";

/**
 * The metadata of retina_plugin in the bytes of an ONNX file. Throws an Error with one line.
 *
 * ModelProto is a list of fields; field 14 are the metadata_props, each a key (1) and a value (2).
 */
export function readMetadata(bytes) {
  let text = null;
  try {
    for (const [number, entry] of fields(bytes)) {
      if (number !== 14) continue;
      const pair = new Map(fields(entry));
      if (decode(pair.get(1)) === "retina_plugin") text = decode(pair.get(2));
    }
  } catch {
    throw new Error("it is no ONNX file");
  }
  if (text === null) throw new Error("it has no metadata of retina_plugin: write it with `retina export --format onnx`");
  let metadata;
  try {
    metadata = JSON.parse(text);
  } catch {
    throw new Error("its metadata cannot be read: write it again with `retina export --format onnx`");
  }
  if (metadata.version !== 1) throw new Error(`its metadata has version ${metadata.version}, this page reads version 1: write the page again`);
  if (metadata.stage !== "nms") throw new Error(`it was exported with --output-stage ${metadata.stage}: a page needs the stage nms`);
  if (metadata.resampler === "custom") throw new Error("it was exported with an INPUT.MAPPER that prepares images in its own way, which a page cannot");
  return metadata;
}

const decode = (bytes) => new TextDecoder().decode(bytes);

// Pairs of field number and bytes of a protobuf message; numbers have no bytes.
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let scale = 1; ; scale *= 128) {
      if (at >= bytes.length || scale > 2 ** 63) throw new Error("it ends too early");
      const byte = bytes[at++];
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const tag = varint();
    const number = Math.floor(tag / 8), wire = tag % 8;
    if (number === 0) throw new Error("no field has this number");
    if (wire === 0) varint();
    else if (wire === 1) at += 8;
    else if (wire === 5) at += 4;
    else if (wire === 2) {
      const length = varint();
      if (at + length > bytes.length) throw new Error("it ends too early");
      yield [number, bytes.subarray(at, at + length)];
      at += length;
    } else throw new Error("no wire type");
  }
}

/** Width and height that an image is resized to. */
export function testSize(width, height, { min_size: short, max_size: longest, resize: kind }) {
  if (short === 0) return [width, height];
  if (kind === "torchvision") {
    const scale = Math.min(short / Math.min(width, height), longest / Math.max(width, height));
    return [width, height].map((side) => Math.max(1, Math.floor(side * scale)));
  }
  let scale = short / Math.min(width, height);
  let [newWidth, newHeight] = height < width ? [scale * width, short] : [short, scale * height];
  if (Math.max(newWidth, newHeight) > longest) {
    scale = longest / Math.max(newWidth, newHeight);
    [newWidth, newHeight] = [newWidth * scale, newHeight * scale];
  }
  return [Math.trunc(newWidth + 0.5), Math.trunc(newHeight + 0.5)];
}

/** The graph's input for an image: {width, height, data}, data as float32 planes (3, H, W). */
export function toInput(image, metadata) {
  const [width, height] = testSize(image.width, image.height, metadata);
  if (width === 0 || height === 0) {
    throw new Error(`${image.width} × ${image.height} pixels are too thin: no pixel of the short side is left`);
  }
  let resized = image;
  if (width !== image.width || height !== image.height || metadata.resize === "torchvision") {
    resized = metadata.resize === "torchvision"
      ? resizeWithoutAntialias(image, width, height)
      : resize(image, width, height, metadata.resampler);
  }
  const area = width * height;
  const data = new Float32Array(3 * area);
  for (let c = 0; c < 3; c++) {
    const channel = metadata.format === "BGR" ? 2 - c : c;
    for (let i = 0; i < area; i++) data[c * area + i] = resized.data[3 * i + channel];
  }
  return { width, height, data };
}

/**
 * Detections in the frame of the image: [{box: [x1, y1, x2, y2], score, classId}], by decreasing
 * score. Boxes are scaled, clipped, and left out if they have no area, as in Detectron2.
 */
export function toDetections(boxes, scores, classes, image, input, metadata) {
  const scale = [image.width / input.width, image.height / input.height].map(Math.fround);
  const limits = [image.width, image.height];
  const clips = metadata.boxes_outside !== "clip"; // such a model has clipped them itself
  const found = [];
  for (let i = 0; i < scores.length; i++) {
    const classId = Number(classes[i]);
    if (classId < 0) continue;
    const box = Array.from(boxes.subarray(4 * i, 4 * i + 4), (value, k) => {
      const scaled = Math.fround(value * scale[k % 2]);
      return clips ? Math.min(Math.max(scaled, 0), limits[k % 2]) : scaled;
    });
    if (box[2] > box[0] && box[3] > box[1]) found.push({ box, score: scores[i], classId });
  }
  return found;
}

/** COCO's result list, with the entries of `retina predict`. */
export function toCoco(found, metadata, fileName) {
  const stem = fileName.replace(/\.[^.]*$/, "");
  const imageId = /^\d{1,15}$/.test(stem) ? Number(stem) : 1;
  return found.map(({ box: [x1, y1, x2, y2], score, classId }) => ({
    image_id: imageId,
    category_id: metadata.category_ids ? metadata.category_ids[classId] : classId,
    bbox: [x1, y1, Math.fround(x2 - x1), Math.fround(y2 - y1)],
    score,
    file_name: fileName,
    category_name: metadata.class_names[classId],
  }));
}
