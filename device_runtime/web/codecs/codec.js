/** Codecs of a change by name: encoding one, and decoding any that a phone knows (`fedpara_edge.codecs`). */

import { joined } from '../digest.js';
import { FedparaError } from '../errors.js';
import { entriesIn, isStatistic, unflatten } from '../layout.js';
import { SFC64 } from '../random.js';
import { bytesOf, float32 } from '../tensorfile.js';
import { parseTyped } from '../text.js';
import { fromHalf, halfBits, LARGEST_HALF, makeFloats } from './floats.js';
import { makeIntegers } from './integers.js';
import { CHUNK_ENTRIES, cut, DamageError, Section } from './parts.js';
import { BY, makeUniform } from './uniform.js';

/** @typedef {import('../layout.js').TensorSpec} TensorSpec */
/** @typedef {import('../tensorfile.js').Tensor} Tensor */
/** @typedef {import('./parts.js').Flat} Flat */
/** @typedef {import('./parts.js').Random} Random */
/** @typedef {import('./parts.js').Zstd} Zstd */
/**
 * Function that encodes a chunk into a section.
 * @typedef {(values: Flat, lengths: readonly number[], decoded: Flat, zstd: Zstd) => Uint8Array[]} Write
 */
/**
 * A codec with its options.
 * @typedef {object} Codec
 * @property {string} name
 * @property {number} version
 * @property {Record<string, number>} settings Header fields besides name and version.
 * @property {number} block Block size in entries; 0 for one block a chunk.
 * @property {(tensors: readonly TensorSpec[], change: Flat, random: Random) => Write} begin
 * @property {(section: Section, lengths: readonly number[], out: Flat, zstd: Zstd) => void} decode
 */
/**
 * A change as it is stored.
 * @typedef {object} Encoded
 * @property {Record<string, string | number>} codec Header field.
 * @property {Map<string, Tensor>} arrays
 * @property {Flat} decoded Change that every reader gets.
 * @property {string} sums Header field with the sums of what the chunks are stored in.
 */

const FLOAT32 = 'float32', STATISTICS = 'statistics', PAYLOAD = 'payload';
/** @type {Record<string, number>} */
const BITS = { int8: 8, int4: 4, int3: 3, int2: 2 };
const KNOWN = [FLOAT32, 'float16', 'bfloat16', ...Object.keys(BITS), 'uniform'];

/**
 * Codec as it is typed, such as `uniform:step=2`; null for float32.
 * @param {string} text
 * @returns {Codec | null}
 */
export function findCodec(text) {
  const { name, options } = parseTyped(text);
  const take = (/** @type {string} */ option, /** @type {number} */ unset) => {
    const value = options[option];
    delete options[option];
    return value === undefined ? unset : Number(value);
  };
  /** @type {Codec | null | undefined} */
  let found;
  if (name === FLOAT32) found = null;
  else if (name === 'float16' || name === 'bfloat16') found = makeFloats(name);
  else if (name in BITS) {
    const block = take('block', 1024), entropy = take('entropy', 1);
    if (block >= 16 && block <= 1 << 16) found = makeIntegers(name, BITS[name], { block, entropy });
  } else if (name === 'uniform') {
    const step = take('step', 2), by = options['by'] ?? 'all';
    delete options['by'];
    if (step >= 1e-4 && step <= 100 && by in BY) found = makeUniform({ step, block: BY[/** @type {'all'} */ (by)] });
  }
  if (found === undefined || Object.keys(options).length) {
    throw new FedparaError(`codec: expected one of ${KNOWN.join(', ')}, found ${text}; take one that phones know`);
  }
  return found;
}

/**
 * Encode a flat change.
 * @param {Codec | null} codec Null for float32.
 * @param {readonly TensorSpec[]} tensors Shared tensors, in the order of the flat change.
 * @param {Flat} change
 * @param {{seed: number | null, zstd: Zstd}} options Seed of random rounding; null to round to the nearest.
 * @returns {Encoded}
 */
export function encodeChange(codec, tensors, change, { seed, zstd }) {
  if (codec === null) {
    const values = unflatten(tensors, change);
    const arrays = tensors.map(({ name, shape }) => /** @type {const} */ ([name, float32(shape, floatsOf(values, name))]));
    const sums = chunksOf(change).map((chunk) => sumOf(bytesOf(chunk))).join('');
    return { codec: { name: FLOAT32, version: 1 }, arrays: new Map(arrays), decoded: change, sums };
  }
  const trained = tensors.filter((tensor) => !isStatistic(tensor)), entries = entriesIn(trained);
  const decoded = new Float32Array(change.length), generator = seed === null ? null : new SFC64(seed);
  const part = change.subarray(0, entries), write = codec.begin(trained, part, generator && (() => generator.float32()));
  const sections = cut(trained, codec.block).map((lengths, chunk) => {
    const start = chunk * CHUNK_ENTRIES, stop = Math.min(start + CHUNK_ENTRIES, entries);
    return joined(write(part.subarray(start, stop), lengths, decoded.subarray(start, stop), zstd));
  });
  const sizes = Uint32Array.from(sections, (section) => section.length);
  const payload = joined([bytesOf(sizes), ...sections]);
  /** @type {Map<string, Tensor>} */
  const arrays = new Map([[PAYLOAD, { dtype: 'uint8', shape: [payload.length], values: payload }]]);
  let sums = sections.map(sumOf).join('');
  if (entries < change.length) {
    const { stored, read } = storedStatistics(change.slice(entries));
    arrays.set(STATISTICS, stored);
    decoded.set(read, entries);
    sums += sumOf(bytesOf(stored.values));
  }
  return { codec: { name: codec.name, version: codec.version, ...codec.settings }, arrays, decoded, sums };
}

/**
 * Flat change in a file, of any codec that a phone knows.
 * @param {import('../tensorfile.js').TensorFile} file
 * @param {string} name Name of the file, for errors.
 * @param {readonly TensorSpec[]} tensors Shared tensors, in the order of the flat change.
 * @param {Zstd} zstd
 * @returns {Flat}
 */
export function decodeChange({ header, tensors: arrays }, name, tensors, zstd) {
  const stated = header['codec'] ?? { name: FLOAT32, version: 1 }, change = new Float32Array(entriesIn(tensors));
  const damaged = (/** @type {string} */ message) => new FedparaError(`${name}: expected ${message}; fetch it again`);
  if (stated.name === FLOAT32) {
    let position = 0;
    for (const spec of tensors) {
      const found = arrays.get(spec.name);
      if (found?.dtype !== FLOAT32 || String(found.shape) !== String(spec.shape) || arrays.size !== tensors.length) {
        throw damaged(`tensor '${spec.name}' of float32 [${spec.shape}], found ${found?.dtype} [${found?.shape ?? ''}]`);
      }
      change.set(/** @type {Flat} */ (found.values), position);
      position += found.values.length;
    }
    return change;
  }
  const codec = openCodec(stated, name), payload = arrays.get(PAYLOAD)?.values;
  const trained = tensors.filter((tensor) => !isStatistic(tensor)), entries = entriesIn(trained);
  const blocks = cut(trained, codec.block), stored = arrays.get(STATISTICS);
  if (!(payload instanceof Uint8Array) || payload.length < 4 * blocks.length) throw damaged(`an array '${PAYLOAD}', found none`);
  if ((stored?.values.length ?? 0) !== change.length - entries) {
    throw damaged(`${change.length - entries} running statistics, found ${stored?.values.length ?? 'none'}`);
  }
  const sizes = new DataView(payload.buffer, payload.byteOffset);
  let position = 4 * blocks.length;
  try {
    blocks.forEach((lengths, chunk) => {
      const size = sizes.getUint32(4 * chunk, true), start = chunk * CHUNK_ENTRIES;
      const section = new Section(payload.subarray(position, (position += size)));
      codec.decode(section, lengths, change.subarray(start, Math.min(start + CHUNK_ENTRIES, entries)), zstd);
      section.finish();
    });
    if (position !== payload.length) throw new DamageError(`${position} bytes of sections, found ${payload.length}`);
  } catch (error) {
    if (error instanceof DamageError) throw damaged(error.message);
    throw error;
  }
  if (stored) {
    const values = [...stored.values].map((value) => (stored.dtype === 'float16' ? fromHalf(Number(value)) : Number(value)));
    change.set(values, entries);
  }
  return change;
}

/**
 * @param {Record<string, any>} stated
 * @param {string} file
 */
function openCodec({ name, version, block }, file) {
  if (version === 1 && (name === 'float16' || name === 'bfloat16')) return makeFloats(name);
  if (name in BITS && (version === 1 || (version === 2 && name === 'int8')) && block >= 16 && block <= 1 << 16) {
    return makeIntegers(name, BITS[name], { block, version });
  }
  if (name === 'uniform' && version === 1 && Object.values(BY).includes(block)) return makeUniform({ step: 1, block });
  throw new FedparaError(
    `${file}: expected one of the codecs ${KNOWN.join(', ')}, found ${name} version ${version}; ` +
      'write the weights with one that phones know',
  );
}

/** @param {Flat} change */
const chunksOf = (change) =>
  Array.from({ length: Math.ceil(change.length / CHUNK_ENTRIES) }, (_, chunk) =>
    change.subarray(chunk * CHUNK_ENTRIES, (chunk + 1) * CHUNK_ENTRIES),
  );

/**
 * Sum of the 64-bit words of some bytes, in hexadecimal digits (`fedpara_edge.codecs.sums`).
 * @param {Uint8Array} bytes
 */
export function sumOf(bytes) {
  const padded = new Uint8Array(Math.ceil(bytes.length / 8) * 8);
  padded.set(bytes);
  const words = new Uint32Array(padded.buffer);
  let low = 0, high = 0; // exact up to 2^21 words, which no chunk has
  for (let word = 0; word < words.length; word += 2) {
    low += words[word];
    high += words[word + 1];
  }
  return BigInt.asUintN(64, BigInt(low) + (BigInt(high) << 32n)).toString(16).padStart(16, '0');
}

/**
 * Running statistics as they are stored, rounded towards zero (`fedpara_edge.codecs.statistics`).
 * @param {Flat} values
 * @returns {{stored: Tensor, read: Flat}}
 */
function storedStatistics(values) {
  if (values.some((value) => Math.abs(value) > LARGEST_HALF)) {
    return { stored: float32([values.length], values), read: values };
  }
  const halves = Uint16Array.from(values, (value) => {
    const bits = halfBits(value);
    return Math.abs(fromHalf(bits)) > Math.abs(value) ? bits - 1 : bits;
  });
  return { stored: { dtype: 'float16', shape: [values.length], values: halves }, read: Float32Array.from(halves, fromHalf) };
}

/**
 * @param {import('../tensorfile.js').Floats} values
 * @param {string} name
 */
const floatsOf = (values, name) => /** @type {Flat} */ (values.get(name));
