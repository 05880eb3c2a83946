/** The codecs `int8`, `int4`, `int3` and `int2`: integers times the scale of a block (`fedpara_edge.codecs.integers`). */

import { checkRange, compress, DamageError, decompress, nearest, roundUp, scaleBytes, takeScales } from './parts.js';

/** @typedef {import('./codec.js').Codec} Codec */
/**
 * Way of turning integers into bytes that are stored as they are, and bytes that are entropy-coded.
 * @typedef {object} Packing
 * @property {(count: number) => [plain: number, symbols: number]} sizes
 * @property {(integers: Int8Array) => [plain: Uint8Array, symbols: Uint8Array]} pack
 * @property {(plain: Uint8Array, symbols: Uint8Array, out: Float32Array) => void} unpack
 */

/** Scale of least squared error over the root mean square of a block, by the largest integer. */
const STEPS = new Map([[1, 1.31], [3, 0.76], [7, 0.45]]);

/**
 * @param {string} name
 * @param {number} bits
 * @param {{block: number, entropy?: number, version?: number}} options
 * @returns {Codec}
 */
export function makeIntegers(name, bits, { block, entropy = 1, version = bits === 8 ? 2 : 1 }) {
  const largest = 2 ** (bits - 1) - 1, packing = version === 2 ? HALVES : makeDigits(largest);
  return {
    name,
    version,
    settings: { block },
    block,
    begin(tensors, change, random) {
      checkRange(tensors, change);
      return (values, lengths, decoded, zstd) => {
        const integers = new Int8Array(values.length), scales = [];
        let start = 0;
        for (const length of lengths) {
          const scale = roundUp(scaleOf(values.subarray(start, start + length), largest, random === null));
          for (let i = start; i < start + length; i++) {
            const ratio = Math.fround(values[i] / (scale || 1));
            const rounded = random ? Math.floor(Math.fround(random() + ratio)) : nearest(ratio);
            integers[i] = Math.min(Math.max(rounded, -largest), largest);
            decoded[i] = integers[i] * scale;
          }
          scales.push(scale);
          start += length;
        }
        const [plain, symbols] = packing.pack(integers);
        return [scaleBytes(scales), plain, ...compress(symbols, entropy ? zstd : null)];
      };
    },
    decode(section, lengths, out, zstd) {
      const scales = takeScales(section, lengths.length), [plainBytes, symbolBytes] = packing.sizes(out.length);
      const plain = section.take(plainBytes, 'integers');
      packing.unpack(plain, decompress(section, symbolBytes, zstd), out);
      let start = 0;
      lengths.forEach((length, block) => {
        for (let i = start; i < start + length; i++) out[i] *= scales[block];
        start += length;
      });
    },
  };
}

/**
 * @param {Float32Array} values
 * @param {number} largest
 * @param {boolean} toNearest Whether to clip the few largest entries where that lowers the squared error.
 */
function scaleOf(values, largest, toNearest) {
  let top = 0, squares = 0;
  for (const value of values) {
    top = Math.max(top, Math.abs(value));
    squares += value * value;
  }
  const whole = Math.fround(top / largest), step = STEPS.get(largest);
  return toNearest && step !== undefined ? Math.min(whole, step * Math.sqrt(squares / values.length)) : whole;
}

/**
 * Integers from -L to L as digits (`fedpara_edge.codecs.digits`).
 * @param {number} largest
 * @returns {Packing}
 */
function makeDigits(largest) {
  const base = 2 * largest + 1, digits = Math.floor(Math.log(256) / Math.log(base) + 1e-9);
  const widthOf = (/** @type {number} */ count) => Math.ceil(count / digits);
  return {
    sizes: (count) => [0, widthOf(count)],
    pack(integers) {
      const width = widthOf(integers.length), packed = new Uint8Array(width);
      for (let digit = digits - 1; digit >= 0; digit--) {
        for (let i = 0; i < width; i++) packed[i] = packed[i] * base + largest + (integers[digit * width + i] ?? 0);
      }
      return [new Uint8Array(), packed];
    },
    unpack(_, symbols, out) {
      const width = symbols.length;
      symbols.forEach((symbol, i) => {
        if (symbol >= base ** digits) {
          throw new DamageError(`integers from -${largest} to ${largest}, found a byte of ${symbol}`);
        }
        let rest = symbol;
        for (let place = i; place < out.length; place += width) {
          out[place] = (rest % base) - largest;
          rest = Math.floor(rest / base);
        }
      });
    },
  };
}

/** Integers of 8 bits in halves (`fedpara_edge.codecs.halves`).
 * @type {Packing} */
const HALVES = {
  sizes: (count) => [Math.ceil(count / 2), Math.ceil(count / 2)],
  pack(integers) {
    const width = Math.ceil(integers.length / 2), lower = new Uint8Array(width), upper = new Uint8Array(width);
    for (let i = 0; i < width; i++) {
      const first = integers[i] + 8, second = (integers[width + i] ?? 0) + 8;
      lower[i] = (first & 15) | (second << 4);
      upper[i] = (first & 240) | ((second & 240) >>> 4);
    }
    return [lower, upper];
  },
  unpack(lower, upper, out) {
    const width = lower.length;
    for (let i = 0; i < out.length; i++) {
      const first = i < width, at = first ? i : i - width;
      const byte = first ? (upper[at] & 240) | (lower[at] & 15) : ((upper[at] << 4) & 240) | (lower[at] >>> 4);
      out[i] = ((byte - 8) << 24) >> 24;
      if (out[i] < -127) throw new DamageError('integers from -127 to 127, found -128');
    }
  },
};
