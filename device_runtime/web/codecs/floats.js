/** The codecs `float16` and `bfloat16` (`fedpara_edge.codecs.floats`), and conversions between floats. */

import { bitsOf, checkRange, compress, decompress, floatOf } from './parts.js';

/** @typedef {import('./codec.js').Codec} Codec */
/** @typedef {'float16' | 'bfloat16'} Name */

export const LARGEST_HALF = 65504;

/**
 * Bits of the nearest float16, ties to even; of magnitudes up to `LARGEST_HALF`.
 * @param {number} value
 */
export function halfBits(value) {
  const bits = bitsOf(value), sign = (bits >>> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x38800000) return sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >>> 13) & 1)) >>> 13);
  const scaled = Math.abs(value) * 2 ** 24, floor = Math.floor(scaled), rest = scaled - floor;
  return sign | (floor + Number(rest > 0.5 || (rest === 0.5 && floor % 2 === 1)));
}

/** @param {number} bits */
export function fromHalf(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >>> 10) & 31, fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return exponent ? sign * 2 ** (exponent - 15) * (1 + fraction / 1024) : sign * 2 ** -24 * fraction;
}

/** @param {number} value */
function brainBits(value) {
  const bits = bitsOf(value), rounded = (bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16;
  return (rounded & 0x7fff) === 0x7f80 ? rounded - 1 : rounded;
}

/** @param {number} bits */
const fromBrain = (bits) => floatOf((bits << 16) >>> 0);

/**
 * @param {Name} name
 * @returns {Codec}
 */
export function makeFloats(name) {
  const [narrow, widen] = name === 'float16' ? [halfBits, fromHalf] : [brainBits, fromBrain];
  return {
    name,
    version: 1,
    settings: {},
    block: 0,
    begin(tensors, change) {
      if (name === 'float16') checkRange(tensors, change, LARGEST_HALF);
      return (values, _, decoded, zstd) => {
        const low = new Uint8Array(values.length), high = new Uint8Array(values.length);
        values.forEach((value, i) => {
          const bits = narrow(value), rotated = ((bits << 1) | (bits >>> 15)) & 0xffff;
          decoded[i] = widen(bits);
          low[i] = rotated & 255;
          high[i] = rotated >>> 8;
        });
        return [low, ...compress(high, zstd)];
      };
    },
    decode(section, _, out, zstd) {
      const low = section.take(out.length, 'low bytes'), high = decompress(section, out.length, zstd);
      for (let i = 0; i < out.length; i++) {
        const rotated = low[i] | (high[i] << 8);
        out[i] = widen((rotated >>> 1) | ((rotated & 1) << 15));
      }
    },
  };
}
