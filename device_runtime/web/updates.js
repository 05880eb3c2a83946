/** Kind `update`: its directions, and folds to the bits that they have everywhere (`fedpara_edge.factors.update`). */

import { notFinite, sizeOf } from './layout.js';
import { randomBytes, seedOf } from './splitmix.js';

/** @typedef {import('./layout.js').Layout} Layout */
/** @typedef {import('./layout.js').Update} Update */
/** @typedef {import('./tensorfile.js').Floats} Floats */
/** @typedef {{mask: Float32Array<ArrayBuffer>, a: Float32Array<ArrayBuffer>, b: Float32Array<ArrayBuffer>}} Directions */
/** @typedef {Float32Array<ArrayBuffer>} Flat */

/**
 * Mask and directions of a layer in a period.
 * @param {Update} update
 * @param {string} fingerprint Fingerprint of the bundle.
 * @param {number} period
 * @returns {Promise<Directions>}
 */
async function drawDirections({ layer, parts }, fingerprint, period) {
  const seed = await seedOf(`fedpara-edge/update ${fingerprint} ${period} ${layer.name}`);
  const [entries, rows, columns] = [parts['mask'], parts['a'], parts['b']].map(sizeOf), scale = Math.fround(layer.scale);
  const drawn = randomBytes(seed, rows + columns + Math.ceil(entries / 8)), signs = drawn.subarray(rows + columns);
  const values = Float32Array.from(drawn.subarray(0, rows + columns), (byte) => (2 * byte - 255) / 256);
  return {
    mask: Float32Array.from({ length: entries }, (_, i) => ((signs[i >> 3] >> (i & 7)) & 1 ? -scale : scale)),
    a: values.slice(0, rows),
    b: values.slice(rows),
  };
}

/**
 * All that a training from some weights draws from seeds, by name.
 * @param {Layout} layout
 * @param {string} fingerprint
 * @param {number} round Round of the weights.
 * @returns {Promise<Floats>}
 */
export async function drawnTensors(layout, fingerprint, round) {
  /** @type {Floats} */
  const found = new Map();
  for (const update of layout.updates) {
    const period = isFolded(update) ? Math.floor(round / update.layer.reset_every) : 0;
    const directions = await drawDirections(update, fingerprint, period);
    for (const [part, values] of Object.entries(directions)) found.set(update.parts[part].name, values);
  }
  return found;
}

/**
 * Tensors of the weights of a round that a file leaves out, as they are zero.
 * @param {Layout} layout
 * @param {number} round
 */
export function zerosOf(layout, round) {
  return layout.updates.filter(isFolded).flatMap(({ layer, parts }) => [
    ...(round % layer.reset_every ? [] : [parts['u'], parts['v']]),
    ...(round < layer.reset_every && parts['velocity'] ? [parts['velocity']] : []),
  ]);
}

/**
 * Tensors of the weights of a round, with the updates folded whose period ends with it.
 * @param {Layout} layout
 * @param {Floats} tensors Tensors with updates in the directions of the round before.
 * @param {string} fingerprint
 * @param {number} round
 */
export async function folded(layout, tensors, fingerprint, round) {
  const found = new Map(tensors);
  for (const update of layout.updates.filter(isFolded)) {
    const { layer, parts } = update, of = (/** @type {string} */ part) => /** @type {Flat} */ (tensors.get(parts[part].name));
    const factors = { u: of('u'), v: of('v') };
    if (round % layer.reset_every || notFinite(new Map(Object.entries(factors))) !== undefined) continue;
    const directions = await drawDirections(update, fingerprint, round / layer.reset_every - 1);
    const change = composed(layer.rank, factors, directions), base = of('base');
    if (parts['velocity']) {
      const beta = layer.base_momentum ?? 0, velocity = of('velocity').map((value, i) => beta * value + (change?.[i] ?? 0));
      found.set(parts['velocity'].name, velocity);
      found.set(parts['base'].name, base.map((value, i) => value + velocity[i]));
    } else if (change) found.set(parts['base'].name, base.map((value, i) => value + change[i]));
    for (const part of ['u', 'v']) found.set(parts[part].name, new Float32Array(of(part).length));
  }
  return found;
}

/** @param {Update} update */
const isFolded = ({ parts }) => parts['u'].role === 'shared';

/**
 * Composed update M ⊙ (Û Bᵀ + A V̂ᵀ), of whose product every sum is exact; null if U and V are zero.
 * @param {number} rank
 * @param {{u: Flat, v: Flat}} factors
 * @param {Directions} directions
 */
function composed(rank, factors, { mask, a, b }) {
  const largest = [factors.u, factors.v].reduce((found, each) => each.reduce((m, x) => Math.max(m, Math.abs(x)), found), 0);
  if (largest === 0) return null;
  const unit = powerOfTwo(exponentOf(largest) - (45 - (32 - Math.clz32(2 * rank - 1))));
  const [u, v] = [factors.u, factors.v].map((each) => Float64Array.from(each, (value) => toEven(value / unit) * unit));
  const rows = u.length / rank, columns = v.length / rank, found = new Float64Array(rows * columns);
  for (let i = 0, place = 0; i < rows; i++) {
    for (let j = 0; j < columns; j++, place++) {
      let sum = 0;
      for (let r = 0, left = i * rank, right = j * rank; r < rank; r++, left++, right++) {
        sum += u[left] * b[right] + a[left] * v[right];
      }
      found[place] = mask[place] * sum;
    }
  }
  return found;
}

const MAGIC = 1.5 * 2 ** 52, VIEW = new DataView(new ArrayBuffer(8));

/**
 * Nearest integer, the even one of two, of a number below 2^51.
 * @param {number} value
 */
const toEven = (value) => value + MAGIC - MAGIC;

/**
 * Exponent e of the smallest power of two 2^e above a float32.
 * @param {number} value
 */
function exponentOf(value) {
  VIEW.setFloat64(0, value);
  return (VIEW.getUint16(0) >> 4) - 1022;
}

/** @param {number} exponent */
function powerOfTwo(exponent) {
  VIEW.setBigUint64(0, BigInt(exponent + 1023) << 52n);
  return VIEW.getFloat64(0);
}
