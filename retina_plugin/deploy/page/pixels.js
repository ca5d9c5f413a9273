// Pixels as retina_plugin's mappers make them, so that scores are equal too. A browser's own
// resizing differs, and its decoder loses the colour below transparent pixels of a PNG.
//
// An image is {width, height, data}: data has 3 bytes a pixel, RGB, row by row.

const SIGNATURE = [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a];
const CHANNELS = { 0: 1, 2: 3, 3: 1, 4: 2, 6: 4 }; // by colour type
const ADAM7 = [[0, 0, 8, 8], [4, 0, 8, 8], [0, 4, 4, 8], [2, 0, 4, 4], [0, 2, 2, 4], [1, 0, 2, 2], [0, 1, 1, 2]];

export const isPng = (bytes) => SIGNATURE.every((byte, i) => bytes[i] === byte);

/**
 * The RGB of a canvas' pixels, 4 bytes each. Throws an Error with one line if one is transparent:
 * a canvas multiplies colours by alpha, so they are not those of the file.
 */
export function opaqueRgb(pixels) {
  const number = pixels.length / 4;
  const data = new Uint8Array(3 * number);
  for (let i = 0; i < number; i++) {
    if (pixels[4 * i + 3] < 255) throw new Error("a part of it is transparent: save it as PNG");
    for (let c = 0; c < 3; c++) data[3 * i + c] = pixels[4 * i + c];
  }
  return data;
}

/** Decode a PNG (Uint8Array): upright, without transparency. Throws an Error with one line. */
export async function decodePng(bytes) {
  const { header, palette, orientation, compressed } = readChunks(bytes);
  if (header.colour === 0 && header.depth === 16) {
    throw new Error("it has 16 bits a pixel: convert it to 8 bit");
  }
  let raw;
  try {
    const stream = new Blob(compressed).stream().pipeThrough(new DecompressionStream("deflate"));
    raw = new Uint8Array(await new Response(stream).arrayBuffer());
  } catch {
    throw new Error("it is damaged");
  }
  const image = { width: header.width, height: header.height, data: new Uint8Array(3 * header.width * header.height) };
  const passes = header.interlaced ? ADAM7 : [[0, 0, 1, 1]];
  let offset = 0;
  for (const [x0, y0, dx, dy] of passes) {
    const width = Math.ceil((header.width - x0) / dx);
    const height = Math.ceil((header.height - y0) / dy);
    if (width > 0 && height > 0) offset = readPass(raw, offset, { ...header, width, height }, palette, image, x0, y0, dx, dy);
  }
  return upright(image, orientation);
}

function readChunks(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const result = { header: null, palette: new Uint8Array(768), orientation: 1, compressed: [] };
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const type = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    const data = bytes.subarray(at + 8, at + 8 + length);
    if (at + 12 + length > bytes.length || crc(bytes.subarray(at + 4, at + 8 + length)) !== view.getUint32(at + 8 + length)) {
      throw new Error("it is damaged");
    }
    if (type === "IHDR") {
      const [depth, colour, , , interlaced] = data.subarray(8);
      result.header = { width: view.getUint32(at + 8), height: view.getUint32(at + 12), depth, colour, interlaced };
    } else if (type === "PLTE") result.palette.set(data.subarray(0, 768));
    else if (type === "eXIf") result.orientation = exifOrientation(data);
    else if (type === "IDAT") result.compressed.push(data);
    else if (type === "IEND") break;
    at += 12 + length;
  }
  if (!result.header || !(result.header.colour in CHANNELS)) throw new Error("it is damaged");
  return result;
}

const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? (n >>> 1) ^ 0xedb88320 : n >>> 1;
  return n;
});

function crc(bytes) {
  let c = 0xffffffff;
  for (let i = 0; i < bytes.length; i++) c = CRC_TABLE[(c ^ bytes[i]) & 255] ^ (c >>> 8);
  return (c ^ 0xffffffff) >>> 0;
}

// Undoes the filters (PNG specification, section 9) of one pass and writes its pixels.
function readPass(raw, offset, { width, height, depth, colour }, palette, image, x0, y0, dx, dy) {
  const bits = depth * CHANNELS[colour];
  const step = Math.max(1, bits >> 3);
  const length = Math.ceil((width * bits) / 8);
  if (offset + height * (length + 1) > raw.length) throw new Error("it is damaged");
  let above = new Uint8Array(length);
  for (let y = 0; y < height; y++) {
    const filter = raw[offset];
    const line = raw.subarray(offset + 1, offset + 1 + length);
    for (let i = 0; i < length; i++) {
      const a = i >= step ? line[i - step] : 0;
      const b = above[i];
      if (filter === 1) line[i] += a;
      else if (filter === 2) line[i] += b;
      else if (filter === 3) line[i] += (a + b) >> 1;
      else if (filter === 4) line[i] += paeth(a, b, i >= step ? above[i - step] : 0);
    }
    for (let x = 0; x < width; x++) {
      const to = 3 * ((y0 + y * dy) * image.width + x0 + x * dx);
      writePixel(line, x, depth, colour, palette, image.data, to);
    }
    above = line;
    offset += length + 1;
  }
  return offset;
}

function paeth(a, b, c) {
  const pa = Math.abs(b - c), pb = Math.abs(a - c), pc = Math.abs(a + b - 2 * c);
  return pa <= pb && pa <= pc ? a : pb <= pc ? b : c;
}

function writePixel(line, x, depth, colour, palette, data, to) {
  const bytes = depth === 16 ? 2 : 1; // of 16 bits the upper 8, as Pillow does
  if (colour === 2 || colour === 6) {
    const from = x * CHANNELS[colour] * bytes;
    for (let c = 0; c < 3; c++) data[to + c] = line[from + c * bytes];
    return;
  }
  if (depth >= 8) {
    const value = line[x * CHANNELS[colour] * bytes];
    for (let c = 0; c < 3; c++) data[to + c] = colour === 3 ? palette[3 * value + c] : value;
    return;
  }
  const bit = x * depth;
  const value = (line[bit >> 3] >> (8 - depth - (bit & 7))) & ((1 << depth) - 1);
  for (let c = 0; c < 3; c++) data[to + c] = colour === 3 ? palette[3 * value + c] : (value * 255) / ((1 << depth) - 1);
}

// Tag 274 of a TIFF header; 1, which means upright, if there is none.
function exifOrientation(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  try {
    const little = view.getUint16(0) === 0x4949;
    const start = view.getUint32(4, little);
    for (let i = 0; i < view.getUint16(start, little); i++) {
      const entry = start + 2 + 12 * i;
      if (view.getUint16(entry, little) === 274) return view.getUint16(entry + 8, little);
    }
  } catch { /* it ends too early */ }
  return 1;
}

/** Undo a camera's orientation, 1 to 8; other values count as 1. */
export function upright(image, orientation) {
  if (!(orientation >= 2 && orientation <= 8)) return image;
  const swap = orientation >= 5;
  const { width, height, data } = image;
  const [newWidth, newHeight] = swap ? [height, width] : [width, height];
  const out = new Uint8Array(data.length);
  for (let y = 0; y < newHeight; y++) {
    for (let x = 0; x < newWidth; x++) {
      const u = [2, 3, 6, 7].includes(orientation) ? newWidth - 1 - x : x;
      const v = [3, 4, 7, 8].includes(orientation) ? newHeight - 1 - y : y;
      const from = 3 * (swap ? u * width + v : v * width + u);
      const to = 3 * (y * newWidth + x);
      for (let c = 0; c < 3; c++) out[to + c] = data[from + c];
    }
  }
  return { width: newWidth, height: newHeight, data: out };
}

/**
 * Bilinear with antialiasing, in whole numbers: equal to the bit to Pillow 13, or to PyTorch's
 * interpolate(antialias=True) of uint8. Their weights have 22 and 15 bits.
 */
export function resize(image, width, height, resampler) {
  const fall = image.height - height;
  // Pillow 13: python-pillow/Pillow#9549
  if (resampler === "pillow" && fall > 0 && fall > 2 * (image.width - width)) {
    return filterColumns(filterRows(image, height, resampler), width, resampler);
  }
  return filterRows(filterColumns(image, width, resampler), height, resampler);
}

// For each of `size` outputs the first input and the integer weights of a triangle filter.
function triangle(old, size, resampler) {
  const scale = old / size;
  const support = Math.max(scale, 1);
  const taps = 2 * Math.ceil(support) + 1;
  const first = new Int32Array(size), count = new Int32Array(size);
  const real = new Float64Array(size * taps);
  for (let i = 0; i < size; i++) {
    const center = (i + 0.5) * scale;
    first[i] = Math.max(Math.trunc(center - support + 0.5), 0);
    count[i] = Math.min(Math.trunc(center + support + 0.5), old) - first[i];
    let sum = 0;
    for (let k = 0; k < count[i]; k++) {
      const weight = Math.max(0, 1 - Math.abs((k + first[i] - center + 0.5) * (1 / support)));
      real[i * taps + k] = weight;
      sum += weight;
    }
    for (let k = 0; k < count[i]; k++) real[i * taps + k] /= sum;
  }
  let bits = 22;
  if (resampler !== "pillow") {
    const largest = real.reduce((a, b) => Math.max(a, b), 0);
    for (bits = 0; bits < 22 && Math.trunc(0.5 + largest * 2 ** (bits + 1)) < 2 ** 15; ) bits++;
  }
  return { first, count, taps, bits, weights: Int32Array.from(real, (x) => Math.trunc(0.5 + x * 2 ** bits)) };
}

const clip8 = (x) => (x > 255 ? 255 : x); // no weight is negative

function filterColumns({ width, height, data }, size, resampler) {
  if (size === width) return { width, height, data };
  const { first, count, taps, bits, weights } = triangle(width, size, resampler);
  const out = new Uint8Array(3 * size * height);
  const half = 1 << (bits - 1);
  for (let y = 0, to = 0; y < height; y++) {
    for (let x = 0; x < size; x++, to += 3) {
      let r = half, g = half, b = half;
      let from = 3 * (y * width + first[x]);
      for (let k = x * taps, end = k + count[x]; k < end; k++, from += 3) {
        const weight = weights[k];
        r += data[from] * weight;
        g += data[from + 1] * weight;
        b += data[from + 2] * weight;
      }
      out[to] = clip8(r >> bits);
      out[to + 1] = clip8(g >> bits);
      out[to + 2] = clip8(b >> bits);
    }
  }
  return { width: size, height, data: out };
}

function filterRows({ width, height, data }, size, resampler) {
  if (size === height) return { width, height, data };
  const { first, count, taps, bits, weights } = triangle(height, size, resampler);
  const row = 3 * width;
  const out = new Uint8Array(row * size);
  const sums = new Int32Array(row);
  for (let y = 0; y < size; y++) {
    sums.fill(1 << (bits - 1));
    for (let k = 0; k < count[y]; k++) {
      const weight = weights[y * taps + k];
      const from = (first[y] + k) * row;
      for (let x = 0; x < row; x++) sums[x] += data[from + x] * weight;
    }
    for (let x = 0; x < row; x++) out[y * row + x] = clip8(sums[x] >> bits);
  }
  return { width, height: size, data: out };
}

/** The resize of torchvision's detectors: bilinear, without antialiasing or rounding. */
export function resizeWithoutAntialias(image, width, height) {
  const columns = neighbours(image.width, width), rows = neighbours(image.height, height);
  const data = new Float32Array(3 * width * height);
  for (let y = 0, to = 0; y < height; y++) {
    const top = rows.low[y] * image.width, bottom = rows.high[y] * image.width;
    for (let x = 0; x < width; x++) {
      const left = columns.low[x], right = columns.high[x];
      for (let c = 0; c < 3; c++, to++) {
        const at = (row, column) => image.data[3 * (row + column) + c];
        const upper = at(top, left) * (1 - columns.part[x]) + at(top, right) * columns.part[x];
        const lower = at(bottom, left) * (1 - columns.part[x]) + at(bottom, right) * columns.part[x];
        data[to] = upper * (1 - rows.part[y]) + lower * rows.part[y];
      }
    }
  }
  return { width, height, data };
}

function neighbours(old, size) {
  const low = new Int32Array(size), high = new Int32Array(size), part = new Float32Array(size);
  const scale = Math.fround(old / size);
  for (let i = 0; i < size; i++) {
    const source = Math.max(0, Math.fround(Math.fround(scale * (i + 0.5)) - 0.5));
    low[i] = Math.min(Math.trunc(source), old - 1);
    high[i] = Math.min(low[i] + 1, old - 1);
    part[i] = source - low[i];
  }
  return { low, high, part };
}
