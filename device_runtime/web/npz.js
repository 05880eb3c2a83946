/** Arrays by name from an `.npz` file, that is, from `.npy` files in a zip archive, deflated or not. */

import { FedparaError } from './errors.js';
import { entriesOf } from './tensorfile.js';
import { fromUtf8 } from './text.js';

/** @typedef {import('./text.js').Bytes} Bytes */
/** @typedef {import('./tensorfile.js').Tensor} Tensor */
/** @typedef {{dtype: 'text', shape: number[], texts: string[]}} Texts */
/** @typedef {Tensor | Texts} NpyArray */

const REMEDY = 'save it again with numpy.savez, not as objects';
/** @type {Record<string, {dtype: import('./tensorfile.js').Dtype, type: {new (buffer: ArrayBuffer): import('./tensorfile.js').Values, BYTES_PER_ELEMENT: number}}>} */
const TYPES = {
  '|b1': { dtype: 'bool', type: Uint8Array },
  '|u1': { dtype: 'uint8', type: Uint8Array },
  '|i1': { dtype: 'int8', type: Int8Array },
  '<u2': { dtype: 'uint16', type: Uint16Array },
  '<i2': { dtype: 'int16', type: Int16Array },
  '<u4': { dtype: 'uint32', type: Uint32Array },
  '<i4': { dtype: 'int32', type: Int32Array },
  '<u8': { dtype: 'uint64', type: BigUint64Array },
  '<i8': { dtype: 'int64', type: BigInt64Array },
  '<f4': { dtype: 'float32', type: Float32Array },
  '<f8': { dtype: 'float64', type: Float64Array },
};

/**
 * Some arrays of a file, those of them that it has.
 * @param {Bytes} file
 * @param {string} name Name of the file, for errors.
 * @param {readonly string[]} wanted
 * @returns {Promise<Map<string, NpyArray>>}
 */
export async function readNpz(file, name, wanted) {
  /** @type {Map<string, NpyArray>} */
  const arrays = new Map();
  try {
    for (const member of members(file)) {
      const array = member.name.replace(/\.npy$/, '');
      if (wanted.includes(array)) arrays.set(array, readNpy(await contentOf(file, member)));
    }
  } catch (error) {
    const found = error instanceof Error ? error.message : String(error);
    throw new FedparaError(`${name}: expected an .npz file with numpy arrays of numbers, found ${found}; ${REMEDY}`);
  }
  return arrays;
}

/** @typedef {{name: string, method: number, start: number, bytes: number}} Member */

/**
 * Members of a zip archive, by its central directory (PKWARE's APPNOTE.TXT, 4.3; zip64, which numpy uses for all).
 * @param {Bytes} file
 * @returns {Member[]}
 */
function members(file) {
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
  let end = file.length - 22;
  while (end >= 0 && view.getUint32(end, true) !== 0x06054b50) end--;
  if (end < 0) throw new Error('another file');
  const found = [];
  let position = view.getUint32(end + 16, true);
  for (let left = view.getUint16(end + 10, true); left > 0; left--) {
    if (view.getUint32(position, true) !== 0x02014b50) throw new Error('a damaged archive');
    const nameBytes = view.getUint16(position + 28, true), extraBytes = view.getUint16(position + 30, true);
    const nameStart = position + 46, extra = nameStart + nameBytes;
    let bytes = view.getUint32(position + 20, true), local = view.getUint32(position + 42, true);
    // The sizes that do not fit are in an extra field of kind 1, in this order: content, stored, place.
    for (let at = extra; at + 4 <= extra + extraBytes; at += 4 + view.getUint16(at + 2, true)) {
      if (view.getUint16(at, true) !== 1) continue;
      let field = at + 4 + (view.getUint32(position + 24, true) === 0xffffffff ? 8 : 0);
      if (bytes === 0xffffffff) bytes = Number(view.getBigUint64(field, true)), (field += 8);
      if (local === 0xffffffff) local = Number(view.getBigUint64(field, true));
    }
    found.push({
      name: fromUtf8(file.subarray(nameStart, nameStart + nameBytes)),
      method: view.getUint16(position + 10, true),
      start: local + 30 + view.getUint16(local + 26, true) + view.getUint16(local + 28, true),
      bytes,
    });
    position = extra + extraBytes + view.getUint16(position + 32, true);
  }
  return found;
}

/**
 * @param {Bytes} file
 * @param {Member} member
 * @returns {Promise<Bytes>}
 */
async function contentOf(file, { name, method, start, bytes }) {
  const stored = file.subarray(start, start + bytes);
  if (stored.length !== bytes) throw new Error(`a truncated ${name}`);
  if (method === 0) return stored;
  if (method !== 8) throw new Error(`${name} in a compression other than deflate`);
  const inflated = new Blob([stored]).stream().pipeThrough(new DecompressionStream('deflate-raw'));
  return new Uint8Array(await new Response(inflated).arrayBuffer());
}

/**
 * @param {Bytes} file
 * @returns {NpyArray}
 */
function readNpy(file) {
  if (file.length < 12 || file[0] !== 0x93 || fromUtf8(file.subarray(1, 6)) !== 'NUMPY') throw new Error('no .npy file');
  const view = new DataView(file.buffer, file.byteOffset), long = file[6] > 1;
  const start = long ? 12 : 10, stop = start + (long ? view.getUint32(8, true) : view.getUint16(8, true));
  const header = fromUtf8(file.subarray(start, stop));
  const descr = /'descr': '([^']+)'/.exec(header)?.[1] ?? 'objects', dims = /'shape': \(([^)]*)\)/.exec(header)?.[1];
  if (header.includes("'fortran_order': True")) throw new Error('an array in Fortran order');
  const shape = (dims ?? '').split(',').filter((size) => size.trim()).map(Number);
  const letters = /^<U(\d+)$/.exec(descr);
  if (letters) return { dtype: 'text', shape, texts: textsIn(file.slice(stop), entriesOf(shape), Number(letters[1])) };
  const known = TYPES[descr];
  if (!known || dims === undefined) throw new Error(`an array of dtype ${descr}`);
  const bytes = entriesOf(shape) * known.type.BYTES_PER_ELEMENT;
  if (file.length - stop < bytes) throw new Error('a truncated array');
  return { dtype: known.dtype, shape, values: new known.type(file.slice(stop, stop + bytes).buffer) };
}

/**
 * Texts of as many code points each, padded with zeros.
 * @param {Bytes} stored
 * @param {number} count
 * @param {number} letters
 */
function textsIn(stored, count, letters) {
  const points = new Uint32Array(stored.buffer, 0, count * letters);
  return Array.from({ length: count }, (_, i) => {
    const text = [...points.subarray(i * letters, (i + 1) * letters)].map((point) => String.fromCodePoint(point));
    return text.join('').replace(/\0+$/, '');
  });
}
