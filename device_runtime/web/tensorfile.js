/** Tensors and one JSON header in a safetensors file, byte for byte as `fedpara_edge.storage.tensorfile` writes it. */

import { FedparaError } from './errors.js';
import { compareText, fromUtf8, pythonJson, toUtf8 } from './text.js';

/** @typedef {import('./text.js').Bytes} Bytes */
/**
 * @typedef {Uint8Array<ArrayBuffer> | Int8Array<ArrayBuffer> | Uint16Array<ArrayBuffer> | Int16Array<ArrayBuffer>
 *   | Uint32Array<ArrayBuffer> | Int32Array<ArrayBuffer> | Float32Array<ArrayBuffer> | Float64Array<ArrayBuffer>
 *   | BigInt64Array<ArrayBuffer> | BigUint64Array<ArrayBuffer>} Values
 */
/**
 * @typedef {'bool' | 'uint8' | 'int8' | 'int16' | 'uint16' | 'float16' | 'int32' | 'uint32' | 'float32' | 'float64'
 *   | 'int64' | 'uint64'} Dtype
 */
/** @typedef {{dtype: Dtype, shape: readonly number[], values: Values}} Tensor */
/** @typedef {ReadonlyMap<string, Tensor>} Tensors */
/** @typedef {Map<string, Float32Array<ArrayBuffer>>} Floats Tensors of float32 by name. */
/** @typedef {{header: Record<string, any>, tensors: Map<string, Tensor>}} TensorFile */

const KEY = 'fedpara_edge', METADATA = '__metadata__';
const MAX_TABLE_BYTES = 16 << 20;

/** @type {Record<Dtype, {code: string, type: {new (buffer: ArrayBuffer): Values, BYTES_PER_ELEMENT: number}}>} */
const DTYPES = {
  // In the order of safetensors, which lays the last of them first. The bits of float16 are not interpreted.
  bool: { code: 'BOOL', type: Uint8Array },
  uint8: { code: 'U8', type: Uint8Array },
  int8: { code: 'I8', type: Int8Array },
  int16: { code: 'I16', type: Int16Array },
  uint16: { code: 'U16', type: Uint16Array },
  float16: { code: 'F16', type: Uint16Array },
  int32: { code: 'I32', type: Int32Array },
  uint32: { code: 'U32', type: Uint32Array },
  float32: { code: 'F32', type: Float32Array },
  float64: { code: 'F64', type: Float64Array },
  int64: { code: 'I64', type: BigInt64Array },
  uint64: { code: 'U64', type: BigUint64Array },
};
const ORDER = /** @type {Dtype[]} */ (Object.keys(DTYPES));
const BY_CODE = new Map(ORDER.map((dtype) => [DTYPES[dtype].code, dtype]));

/** @param {readonly number[]} shape */
export const entriesOf = (shape) => shape.reduce((product, size) => product * size, 1);

/**
 * @param {readonly number[]} shape
 * @param {Float32Array<ArrayBuffer>} values
 * @returns {Tensor}
 */
export const float32 = (shape, values) => ({ dtype: 'float32', shape, values });

/**
 * The bytes of an array, without a copy.
 * @param {Values} values
 * @returns {Bytes}
 */
export const bytesOf = (values) => new Uint8Array(values.buffer, values.byteOffset, values.byteLength);

/**
 * File with some tensors and a header; equal arguments give equal bytes.
 * @param {Tensors} tensors
 * @param {object} header Header, whose whole numbers are integers in Python unless they come as `text.Float`.
 * @returns {Bytes}
 */
export function writeTensors(tensors, header) {
  const entries = [...tensors].sort(
    ([one, a], [other, b]) => ORDER.indexOf(b.dtype) - ORDER.indexOf(a.dtype) || compareText(one, other),
  );
  let end = 0;
  const table = entries.map(([name, { dtype, shape, values }]) => {
    const begin = end;
    end += values.byteLength;
    const place = { dtype: DTYPES[dtype].code, shape, data_offsets: [begin, end] };
    return `${JSON.stringify(name)}:${JSON.stringify(place)}`;
  });
  const metadata = `"${METADATA}":${JSON.stringify({ [KEY]: pythonJson(header) })}`;
  const text = toUtf8(`{${[metadata, ...table].join(',')}}`);
  const tableBytes = Math.ceil(text.length / 8) * 8;
  const file = new Uint8Array(8 + tableBytes + end);
  new DataView(file.buffer).setBigUint64(0, BigInt(tableBytes), true);
  file.fill(0x20, 8, 8 + tableBytes);
  file.set(text, 8);
  let position = 8 + tableBytes;
  for (const [, { values }] of entries) {
    file.set(bytesOf(values), position);
    position += values.byteLength;
  }
  return file;
}

/**
 * Tensors and header of a file.
 * @param {Bytes} file
 * @param {string} name Name of the file, for errors.
 * @param {string} format Format that the header must state.
 * @returns {TensorFile}
 */
export function readTensors(file, name, format) {
  const remedy = 'fetch it again';
  const whole = (/** @type {string} */ found) =>
    new FedparaError(`${name}: expected a whole safetensors file, found ${found}; ${remedy}`);
  if (file.length < 8) throw whole(`a file of ${file.length} bytes`);
  const tableBytes = Number(new DataView(file.buffer, file.byteOffset).getBigUint64(0, true));
  if (tableBytes > MAX_TABLE_BYTES) throw whole('one that does not begin like safetensors');
  const start = 8 + tableBytes;
  if (start > file.length) throw whole(`a header of ${tableBytes} bytes in a file of ${file.length}`);
  /** @type {Record<string, any>} */
  let table, header;
  try {
    table = JSON.parse(fromUtf8(file.subarray(8, start)));
    header = JSON.parse(table[METADATA][KEY]);
  } catch {
    throw whole('one without our header');
  }
  if (header.format !== format || header.version !== 1) {
    throw new FedparaError(
      `${name}: expected ${format} version 1, found ${header.format} version ${header.version}; ${remedy}`,
    );
  }
  delete table[METADATA];
  /** @type {Map<string, Tensor>} */
  const tensors = new Map();
  let next = 0;
  const begins = (/** @type {any} */ place) => Number(place?.data_offsets?.[0]);
  for (const [tensor, place] of Object.entries(table).sort(([, a], [, b]) => begins(a) - begins(b))) {
    const dtype = BY_CODE.get(place?.dtype), bytes = dtype ? bytesIn(DTYPES[dtype].type, place.shape) : NaN;
    if (!dtype || String(place.data_offsets) !== `${next},${next + bytes}`) throw whole(`a wrong place of tensor '${tensor}'`);
    const begin = start + next, end = begin + bytes;
    if (end > file.length) throw whole(`${file.length - start} bytes of data where ${next + bytes} are needed`);
    tensors.set(tensor, { dtype, shape: place.shape, values: new DTYPES[dtype].type(file.slice(begin, end).buffer) });
    next += bytes;
  }
  if (start + next !== file.length) throw whole(`${file.length - start} bytes of data where its header tells of ${next}`);
  return { header, tensors };
}

/**
 * Bytes of an array; NaN if the shape is none.
 * @param {{BYTES_PER_ELEMENT: number}} type
 * @param {unknown} shape
 */
function bytesIn({ BYTES_PER_ELEMENT }, shape) {
  if (!Array.isArray(shape) || !shape.every((size) => Number.isSafeInteger(size) && size >= 0)) return NaN;
  return entriesOf(shape) * BYTES_PER_ELEMENT;
}
