/** The codec `uniform`: an integer times a step, of all entries or of each tensor (`fedpara_edge.codecs.uniform`). */

import { checkRange, LARGEST_SCALE, roundUp, scaleBytes, takeScales } from './parts.js';
import { decodeSparse, encodeSparse, LARGEST } from './sparse.js';

/** @typedef {import('./codec.js').Codec} Codec */
/** @typedef {{step: number, zone: number}} Step Step as it is stored, and the dead zone in units of it. */

export const BY = { all: 0, tensor: 1 << 16 };
const WIDEST_ZONE = 0.99;

/**
 * @param {{step: number, block: number}} options Step over the root mean square of the entries that share it.
 * @returns {Codec}
 */
export function makeUniform({ step, block }) {
  const zone = 0.5 + Math.min(0.15 * step, 0.2);
  return {
    name: 'uniform',
    version: 1,
    settings: { block },
    block,
    begin(tensors, change, random) {
      checkRange(tensors, change);
      const stepFor = (/** @type {Float32Array} */ values) => limited(values, step, zone, random === null);
      const common = block ? null : stepFor(change);
      return (values, lengths, decoded) => {
        const integers = new Int32Array(values.length), steps = [];
        let start = 0;
        for (const length of lengths) {
          const found = common ?? stepFor(values.subarray(start, start + length));
          const moved = Math.fround(1 - Math.fround(found.zone));
          for (let i = start; i < start + length; i++) {
            const ratio = Math.fround(values[i] / (found.step || 1));
            integers[i] = random
              ? Math.floor(Math.fround(random() + ratio))
              : Math.sign(ratio) * Math.floor(Math.fround(Math.abs(ratio) + moved));
            decoded[i] = integers[i] * found.step;
          }
          steps.push(found.step);
          start += length;
        }
        return [scaleBytes(steps), ...encodeSparse(integers)];
      };
    },
    decode(section, lengths, out) {
      const steps = takeScales(section, lengths.length), integers = decodeSparse(section, out.length);
      let start = 0;
      lengths.forEach((length, block) => {
        for (let i = start; i < start + length; i++) out[i] = integers[i] * steps[block];
        start += length;
      });
    },
  };
}

/**
 * @param {Float32Array} values Entries that share the step.
 * @param {number} relative
 * @param {number} zone
 * @param {boolean} toNearest Whether no step may be above the largest entry, so that something is always sent.
 * @returns {Step}
 */
function limited(values, relative, zone, toNearest) {
  let top = 0, squares = 0;
  for (const value of values) {
    top = Math.max(top, Math.abs(value));
    squares += value * value;
  }
  const wanted = values.length ? relative * Math.sqrt(squares / values.length) : 0;
  const within = Math.min(Math.max(wanted, Math.fround(top / (LARGEST - 1))), LARGEST_SCALE);
  const step = roundUp(toNearest ? Math.min(within, top) : within);
  return { step, zone: Math.max(Math.min((zone * wanted) / (step || 1), WIDEST_ZONE), zone) };
}
