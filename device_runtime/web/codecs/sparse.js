/** Integers that are mostly zero or small, in nearly as few bits as their entropy (`fedpara_edge.codecs.sparse`). */

import { DamageError } from './parts.js';

/** @typedef {import('./parts.js').Section} Section */

export const LARGEST = 1 << 20;
const LEVELS = 32, MAX_LOW_BITS = 15;
const NONE = 0, RAW = 1, SET = 16, CLEAR = 32;

/**
 * @param {Int32Array} integers
 * @returns {Uint8Array[]}
 */
export function encodeSparse(integers) {
  const values = integers.filter((value) => value !== 0), above = values.map((value) => Math.abs(value) - 1);
  const mean = above.reduce((sum, each) => sum + each, 0) / Math.max(above.length, 1);
  const low = Math.min(Math.max(Math.trunc(Math.log2(Math.max(mean, 1))) - 1, 0), MAX_LOW_BITS);
  const parts = [Uint8Array.of(low), ...encodeBits(bits(integers, (value) => value !== 0))];
  parts.push(packed(bits(values, (value) => value < 0)));
  let left = above.map((each) => each >> low);
  for (let level = 1; left.length && level <= LEVELS; level++) {
    parts.push(...encodeBits(bits(left, (each) => each >= level)));
    left = left.filter((each) => each >= level);
  }
  const excess = new DataView(new ArrayBuffer(4 * left.length));
  left.forEach((each, i) => excess.setUint32(4 * i, each - LEVELS, true));
  return [...parts, new Uint8Array(excess.buffer), ...packedLow(above, low)];
}

/**
 * @param {Section} section
 * @param {number} count
 * @returns {Int32Array} All integers, zeros included.
 */
export function decodeSparse(section, count) {
  const low = section.byte('a number of low bits');
  if (low > MAX_LOW_BITS) throw new DamageError(`at most ${MAX_LOW_BITS} low bits, found ${low}`);
  const positions = decodeBits(section, count), negative = takeBits(section, positions.length, 'signs');
  const magnitudes = new Float64Array(positions.length).fill(1);
  let left = Array.from(positions.keys());
  for (let level = 1; left.length && level <= LEVELS; level++) {
    left = decodeBits(section, left.length).map((place) => left[place]);
    for (const place of left) magnitudes[place]++;
  }
  const excess = section.take(4 * left.length, 'excess'), view = new DataView(excess.buffer, excess.byteOffset);
  left.forEach((place, i) => (magnitudes[place] += view.getUint32(4 * i, true)));
  if (low) {
    const lowBits = takeLow(section, positions.length, low);
    for (let i = 0; i < magnitudes.length; i++) magnitudes[i] = (magnitudes[i] - 1) * 2 ** low + lowBits[i] + 1;
  }
  const integers = new Int32Array(count);
  positions.forEach((place, i) => {
    if (magnitudes[i] > LARGEST) throw new DamageError(`integers up to ${LARGEST}, found one above`);
    integers[place] = negative[i] ? -magnitudes[i] : magnitudes[i];
  });
  return integers;
}

/**
 * @param {Int32Array} values
 * @param {(value: number) => boolean} isSet
 */
const bits = (values, isSet) => Uint8Array.from(values, (value) => Number(isSet(value)));

/**
 * Bits in bytes, from the least significant one on.
 * @param {Uint8Array} bits
 */
function packed(bits) {
  const bytes = new Uint8Array(Math.ceil(bits.length / 8));
  bits.forEach((bit, i) => (bytes[i >> 3] |= bit << (i & 7)));
  return bytes;
}

/**
 * @param {ArrayLike<number>} values
 * @param {number} low
 */
const packedLow = (values, low) =>
  Array.from({ length: low }, (_, place) => packed(Uint8Array.from(values, (value) => (value >> place) & 1)));

/**
 * @param {Section} section
 * @param {number} count
 * @param {string} what
 */
function takeBits(section, count, what) {
  const bytes = section.take(Math.ceil(count / 8), what);
  return Uint8Array.from({ length: count }, (_, i) => (bytes[i >> 3] >> (i & 7)) & 1);
}

/**
 * @param {Section} section
 * @param {number} count
 * @param {number} low
 */
function takeLow(section, count, low) {
  const values = new Uint16Array(count);
  for (let place = 0; place < low; place++) {
    takeBits(section, count, 'low bits').forEach((bit, i) => (values[i] |= bit << place));
  }
  return values;
}

/**
 * Positions of the bits that have a value.
 * @param {Uint8Array} bits
 * @param {number} value
 */
function positionsOf(bits, value) {
  /** @type {number[]} */
  const found = [];
  bits.forEach((bit, i) => {
    if (bit === value) found.push(i);
  });
  return found;
}

/**
 * @param {Uint8Array} bits
 * @returns {Uint8Array[]}
 */
function encodeBits(bits) {
  const count = bits.reduce((sum, bit) => sum + bit, 0);
  if (!count) return [Uint8Array.of(NONE)];
  const kind = 2 * count <= bits.length ? SET : CLEAR;
  const gaps = positionsOf(bits, Number(kind === SET)).map((place, i, all) => place - (all[i - 1] ?? -1) - 1);
  const mean = gaps.reduce((sum, gap) => sum + gap, 0) / Math.max(gaps.length, 1);
  const guess = Math.trunc(Math.log2(Math.max(0.69 * mean, 1)));
  const sizeFor = (/** @type {number} */ k) => gaps.reduce((sum, gap) => sum + (gap >> k), 0) + gaps.length * (1 + k);
  const other = Math.min(guess + 1, MAX_LOW_BITS), low = sizeFor(other) < sizeFor(guess) ? other : guess;
  if (sizeFor(low) + 8 >= bits.length) return [Uint8Array.of(RAW), packed(bits)];
  const ends = [];
  let end = 0;
  for (const gap of gaps) ends.push((end += (gap >> low) + 1));
  const unary = new Uint8Array(end);
  for (const each of ends) unary[each - 1] = 1;
  return [Uint8Array.of(kind + low), encodeCount(gaps.length), ...packedLow(gaps, low), packed(unary)];
}

/**
 * Positions of the set bits in a bit vector.
 * @param {Section} section
 * @param {number} count
 * @returns {number[]}
 */
function decodeBits(section, count) {
  const kind = section.byte('a kind of bit vector');
  if (kind === NONE) return [];
  if (kind === RAW) return positionsOf(takeBits(section, count, 'bits'), 1);
  if (kind < SET || kind >= 2 * CLEAR - SET) {
    throw new DamageError(`a bit vector of kind ${NONE}, ${RAW} or ${SET} to ${2 * CLEAR - SET - 1}, found kind ${kind}`);
  }
  const number = decodeCount(section), low = kind % SET;
  if (number > count) throw new DamageError(`at most ${count} gaps, found ${number}`);
  const below = takeLow(section, number, low);
  const window = section.peek(Math.ceil(((count >> low) + number) / 8));
  /** @type {number[]} */
  const positions = [];
  let gap = 0, place = -1, bit = 0;
  for (; positions.length < number && bit < 8 * window.length; bit++) {
    if ((window[bit >> 3] >> (bit & 7)) & 1) {
      place += (gap << low) + below[positions.length] + 1;
      positions.push(place);
      gap = 0;
    } else gap++;
  }
  if (positions.length < number) throw new DamageError(`${number} gaps, found ${positions.length}`);
  section.take(Math.ceil((number ? bit : 0) / 8), 'gaps');
  if (place >= count) throw new DamageError(`bits among ${count}, found number ${place}`);
  if (kind < CLEAR) return positions;
  const set = new Uint8Array(count).fill(1);
  for (const each of positions) set[each] = 0;
  return positionsOf(set, 1);
}

/** @param {number} count */
function encodeCount(count) {
  const bytes = [];
  for (; count > 127; count >>= 7) bytes.push(128 | (count & 127));
  return Uint8Array.from([...bytes, count]);
}

/** @param {Section} section */
function decodeCount(section) {
  let count = 0;
  for (let place = 0; place < 3; place++) {
    const byte = section.byte('a number of gaps');
    count |= (byte & 127) << (7 * place);
    if (byte < 128) return count;
  }
  throw new DamageError('a number of gaps of 3 bytes, found a longer one');
}
