/** Weights of a round (`fedpara_edge.formats.weights`), and changes that lead to later ones (`…formats.change`). */

import { decodeChange } from './codecs/codec.js';
import { isDrawn, withDrawn } from './codecs/drawn.js';
import { baseOf } from './digest.js';
import { FedparaError } from './errors.js';
import { flatten, notFinite, sizeOf, unflatten } from './layout.js';
import { readTensors } from './tensorfile.js';
import { folded, zerosOf } from './updates.js';

/** @typedef {import('./bundle.js').Bundle} Bundle */
/** @typedef {import('./codecs/parts.js').Zstd} Zstd */
/** @typedef {import('./text.js').Bytes} Bytes */
/** @typedef {{round: number, base: string, tensors: import('./tensorfile.js').Floats}} Weights */

/**
 * Read and verify a weights file.
 * @param {Bytes} file
 * @param {string} name Name of the file, for errors.
 * @param {Bundle} bundle
 * @param {Zstd} zstd
 * @returns {Promise<Weights>}
 */
export async function readWeights(file, name, bundle, zstd) {
  const found = readTensors(file, name, 'fedpara-edge/weights'), { fingerprint, round } = found.header;
  checkFingerprint(name, fingerprint, bundle);
  if (!Number.isSafeInteger(round) || round < 0) {
    throw new FedparaError(`${name}: round: expected a number from 0, found ${JSON.stringify(round)}; fetch it again`);
  }
  const { layout } = bundle, zeros = zerosOf(layout, round), stored = layout.whole.filter((tensor) => !zeros.includes(tensor));
  const whole = isDrawn(found.header) ? await withDrawn(found, name, stored) : found;
  const tensors = unflatten(stored, decodeChange(whole, name, stored, zstd));
  for (const tensor of zeros) tensors.set(tensor.name, new Float32Array(sizeOf(tensor)));
  checkFinite(name, tensors);
  return { round, base: await baseOf(fingerprint, round, tensors), tensors };
}

/**
 * New weights: given ones plus the change in a file, each entry one addition in float32, with the updates folded whose
 * period ends.
 * @param {Weights} weights
 * @param {Bytes} file
 * @param {string} name Name of the file, for errors.
 * @param {Bundle} bundle
 * @param {Zstd} zstd
 * @returns {Promise<Weights>}
 */
export async function applyChange(weights, file, name, bundle, zstd) {
  const found = readTensors(file, name, 'fedpara-edge/change'), { fingerprint, round, base, result } = found.header;
  checkFingerprint(name, fingerprint, bundle);
  if (base !== weights.base || !Number.isSafeInteger(round) || round <= weights.round) {
    throw new FedparaError(
      `${name}: expected a change of the weights of round ${weights.round} (${weights.base.slice(0, 12)}…), found one ` +
        `to round ${round} of ${String(base).slice(0, 12)}…; apply every change since those weights, in order`,
    );
  }
  const change = decodeChange(found, name, bundle.layout.flat, zstd);
  const moved = flatten(bundle.layout.flat, weights.tensors).map((value, i) => value + change[i]);
  const unfolded = new Map([...weights.tensors, ...unflatten(bundle.layout.flat, moved)]);
  const tensors = await folded(bundle.layout, unfolded, fingerprint, round);
  const reached = await baseOf(fingerprint, round, tensors);
  if (reached !== result) {
    throw new FedparaError(
      `${name}: result: expected ${String(result).slice(0, 12)}…, found ${reached.slice(0, 12)}…: the change was ` +
        'altered; fetch it again',
    );
  }
  checkFinite(name, tensors);
  return { round, base: reached, tensors };
}

/**
 * @param {string} name
 * @param {unknown} found
 * @param {Bundle} bundle
 */
function checkFingerprint(name, found, { fingerprint }) {
  if (found === fingerprint) return;
  throw new FedparaError(
    `${name}: expected the fingerprint of the bundle, ${fingerprint.slice(0, 12)}…, found ` +
      `${String(found).slice(0, 12)}…; use files of the same bundle`,
  );
}

/**
 * @param {string} name
 * @param {import('./tensorfile.js').Floats} tensors
 */
function checkFinite(name, tensors) {
  const bad = notFinite(tensors);
  if (bad === undefined) return;
  throw new FedparaError(`${name}: tensor '${bad}': expected finite weights, found NaN or Inf; use those of another round`);
}
