/** Parts that codecs are made of: the flat change's chunks and blocks, their scales, rounding, and entropy coding. */

import { FedparaError } from '../errors.js';
import { entriesIn, sizeOf } from '../layout.js';
import { huffmanFrame } from './huffman.js';

/** @typedef {import('../layout.js').TensorSpec} TensorSpec */
/** @typedef {import('../text.js').Bytes} Bytes */
/**
 * Zstandard, which the caller brings: `@hpcc-js/wasm-zstd`.
 * @typedef {{compress(bytes: Uint8Array, level: number): Uint8Array, decompress(frame: Uint8Array): Uint8Array}} Zstd
 */
/** @typedef {Float32Array<ArrayBuffer>} Flat Flat change, or a part of it. */
/** @typedef {(() => number) | null} Random Source of numbers in [0, 1); null to round to the nearest. */

export const CHUNK_ENTRIES = 1 << 16;
export const LARGEST_SCALE = 2 ** 100;
const SMALLEST_SCALE = 2 ** -100;
const ZSTD_LEVEL = 1; // for what repeats; of other bytes the frame without references is shorter

/** Error of bytes that can't be decoded. */
export class DamageError extends Error {}

/** Cursor over the bytes of a section. */
export class Section {
  /** @param {Uint8Array} stored */
  constructor(stored) {
    this._stored = stored;
    this._position = 0;
  }

  get rest() {
    return this._stored.length - this._position;
  }

  /** @param {number} count */
  peek(count) {
    return this._stored.subarray(this._position, this._position + count);
  }

  /**
   * @param {number} count
   * @param {string} what
   */
  take(count, what) {
    if (count > this.rest) throw new DamageError(`${count} bytes of ${what}, found ${this.rest}`);
    this._position += count;
    return this._stored.subarray(this._position - count, this._position);
  }

  /** @param {string} what */
  byte(what) {
    return this.take(1, what)[0];
  }

  finish() {
    if (this.rest) throw new DamageError(`the end of its bytes, found ${this.rest} more`);
  }
}

/**
 * Lengths of the blocks of every chunk (`fedpara_edge.codecs.blocks`).
 * @param {readonly TensorSpec[]} tensors
 * @param {number} block Block size in entries; 0 for one block a chunk.
 * @returns {number[][]}
 */
export function cut(tensors, block) {
  const entries = entriesIn(tensors), chunks = [];
  let tensor = 0, left = tensors.length ? sizeOf(tensors[0]) : 0;
  for (let start = 0; start < entries; start += CHUNK_ENTRIES) {
    const lengths = [];
    let wanted = Math.min(CHUNK_ENTRIES, entries - start);
    if (!block) lengths.push(wanted);
    while (block && wanted) {
      while (!left) left = sizeOf(tensors[++tensor]);
      const length = Math.min(block, left, wanted);
      lengths.push(length);
      left -= length;
      wanted -= length;
    }
    chunks.push(lengths);
  }
  return chunks;
}

const FLOAT = new Float32Array(1), BITS = new Uint32Array(FLOAT.buffer);

/**
 * The bits of a float32.
 * @param {number} value
 */
export function bitsOf(value) {
  FLOAT[0] = value;
  return BITS[0];
}

/**
 * The float32 of some bits.
 * @param {number} bits
 */
export function floatOf(bits) {
  BITS[0] = bits;
  return FLOAT[0];
}

/**
 * Smallest storable scale that is not below a given one (`fedpara_edge.codecs.scales`).
 * @param {number} scale
 */
export function roundUp(scale) {
  const bits = bitsOf(scale > 0 ? Math.max(scale, SMALLEST_SCALE) : 0);
  return floatOf((bits + 0xffff) & 0xffff0000);
}

/** @param {readonly number[]} scales */
export const scaleBytes = (scales) => Uint8Array.from(scales.flatMap((scale) => [(bitsOf(scale) >>> 16) & 255, bitsOf(scale) >>> 24]));

/**
 * @param {Section} section
 * @param {number} count
 */
export function takeScales(section, count) {
  const stored = section.take(2 * count, 'scales');
  return Array.from({ length: count }, (_, i) => {
    const scale = floatOf(((stored[2 * i] << 16) | (stored[2 * i + 1] << 24)) >>> 0);
    if (scale !== 0 && !(scale >= SMALLEST_SCALE && scale <= LARGEST_SCALE)) {
      throw new DamageError(`scales of 0 or from 2^-100 to 2^100, found ${scale}`);
    }
    return scale;
  });
}

/**
 * @param {readonly TensorSpec[]} tensors
 * @param {Flat} change
 * @param {number} largest Largest magnitude that a codec can express.
 */
export function checkRange(tensors, change, largest = LARGEST_SCALE) {
  const bad = change.findIndex((value) => Math.abs(value) > largest);
  if (bad < 0) return;
  let end = 0;
  const name = tensors.find((tensor) => (end += sizeOf(tensor)) > bad)?.name;
  throw new FedparaError(
    `tensor '${name}': expected a change of at most ${largest}, found ${change[bad]}: the training diverged; ` +
      'lower the learning rate',
  );
}

/**
 * A float32 of magnitude below 2²² rounded to the nearest integer, ties to even.
 * @param {number} value
 */
export const nearest = (value) => Math.fround(Math.fround(value + 12582912) - 12582912);

/**
 * Stored form of some bytes (`fedpara_edge.codecs.frames`).
 * @param {Uint8Array} bytes
 * @param {Zstd | null} zstd Null to store the bytes as they are.
 */
export function compress(bytes, zstd) {
  if (!zstd) return [Uint8Array.of(0), bytes];
  const [found, own] = [zstd.compress(bytes, ZSTD_LEVEL), huffmanFrame(bytes)], frame = own && own.length < found.length ? own : found;
  return frame.length < bytes.length ? [Uint8Array.of(1), frame] : [Uint8Array.of(0), bytes];
}

/**
 * Content of `size` bytes from the rest of a section.
 * @param {Section} section
 * @param {number} size
 * @param {Zstd} zstd
 */
export function decompress(section, size, zstd) {
  const kind = section.byte('a kind of bytes');
  if (kind === 0) return section.take(size, 'symbols');
  if (kind !== 1) throw new DamageError(`bytes of kind 0 or 1, found kind ${kind}`);
  const frame = section.take(section.rest, 'a frame'), expected = `a Zstandard frame of ${size} bytes`;
  let content;
  try {
    content = zstd.decompress(frame);
  } catch (error) {
    throw new DamageError(`${expected}, found another (${/** @type {Error} */ (error).message})`);
  }
  if (content.length !== size) throw new DamageError(`${expected}, found one of ${content.length}`);
  return content;
}
