/**
 * Zstandard frames (RFC 8878) of one block, whose literals are Huffman-coded and which refers back to nothing.
 *
 * Noisy symbols have no repetitions worth a reference, and every false match costs bytes. Python's library keeps to that
 * by parameters (`fedpara_edge.codecs.frames`); Zstandard in WebAssembly lets nobody set them.
 */

import { joined } from '../digest.js';

/** @typedef {import('../text.js').Bytes} Bytes */

const MAGIC = [0x28, 0xb5, 0x2f, 0xfd], TWO_BYTES_OF_SIZE = 0x60, RLE = 1, COMPRESSED = 2;
const FEWEST = 256, MOST = 1 << 16, LONGEST_CODE = 11, MOST_DIRECT = 128, TABLE_LOG = 6;

/** Bits in bytes, the lowest first. */
class Bits {
  constructor() {
    /** @type {number[]} */
    this._bytes = [];
    this._held = this._count = 0;
  }

  /**
   * @param {number} value
   * @param {number} count Number of its low bits, at most 16.
   */
  add(value, count) {
    this._held |= (value & ((1 << count) - 1)) << this._count;
    for (this._count += count; this._count >= 8; this._count -= 8) {
      this._bytes.push(this._held & 255);
      this._held >>>= 8;
    }
  }

  /** All bytes, the last one filled up with zeros. */
  end() {
    if (this._count) this.add(0, 8 - this._count);
    return Uint8Array.from(this._bytes);
  }

  /** All bytes, with a mark from which a reader goes backwards. */
  endMarked() {
    this.add(1, 1);
    return this.end();
  }
}

/**
 * A frame of some bytes; null where there is none that is shorter than they are.
 * @param {Uint8Array} bytes
 * @returns {Bytes | null}
 */
export function huffmanFrame(bytes) {
  const size = bytes.length;
  if (size < FEWEST || size > MOST) return null;
  const counts = new Uint32Array(256);
  for (const byte of bytes) counts[byte]++;
  if (counts[bytes[0]] === size) return frame(size, RLE, size, Uint8Array.of(bytes[0]));
  const lengths = codeLengths(counts), tree = treeOf(lengths);
  if (!tree) return null;
  const codes = codesOf(lengths), part = Math.ceil(size / 4);
  const streams = [0, 1, 2, 3].map((i) => coded(bytes.subarray(i * part, (i + 1) * part), lengths, codes));
  const header = new Bits(), jumps = new Bits();
  for (const { length } of streams.slice(0, 3)) jumps.add(length, 16);
  const literals = joined([tree, jumps.end(), ...streams]), format = size < 1 << 10 ? 1 : size < 1 << 14 ? 2 : 3;
  header.add(COMPRESSED, 2);
  header.add(format, 2);
  for (const each of [size, literals.length]) {
    header.add(each, 10);
    header.add(each >> 10, 4 * (format - 1));
  }
  const sequences = Uint8Array.of(0), block = joined([header.end(), literals, sequences]);
  return block.length < size ? frame(size, COMPRESSED, block.length, block) : null;
}

/**
 * @param {number} size Of the content.
 * @param {number} kind
 * @param {number} blockSize
 * @param {Uint8Array} block
 */
function frame(size, kind, blockSize, block) {
  const header = new Bits();
  header.add(size - FEWEST, 16);
  header.add(1 | (kind << 1) | (blockSize << 3), 16);
  header.add(blockSize >> 13, 8);
  return joined([Uint8Array.from([...MAGIC, TWO_BYTES_OF_SIZE]), header.end(), block]);
}

/**
 * Lengths of the codes that take the fewest bits, by symbol (package-merge); 0 for symbols that are not there.
 * @param {Uint32Array} counts
 */
function codeLengths(counts) {
  const symbols = [...counts.keys()].filter((symbol) => counts[symbol]), lengths = new Uint8Array(256);
  const leaves = symbols.map((symbol) => ({ count: counts[symbol], symbols: [symbol] })).sort((a, b) => a.count - b.count);
  let row = leaves;
  for (let length = 1; length < LONGEST_CODE; length++) {
    const packages = [];
    for (let i = 0; i + 1 < row.length; i += 2) {
      const [one, other] = [row[i], row[i + 1]];
      packages.push({ count: one.count + other.count, symbols: [...one.symbols, ...other.symbols] });
    }
    row = [...leaves, ...packages].sort((a, b) => a.count - b.count);
  }
  for (const { symbols: counted } of row.slice(0, 2 * symbols.length - 2)) for (const symbol of counted) lengths[symbol]++;
  return lengths;
}

/**
 * Codes by symbol: the longest ones begin at 0.
 * @param {Uint8Array} lengths
 */
function codesOf(lengths) {
  const next = new Uint16Array(LONGEST_CODE + 2), codes = new Uint16Array(256);
  for (let length = LONGEST_CODE, first = 0; length > 0; length--) {
    next[length] = first;
    first = (first + lengths.filter((each) => each === length).length) >> 1;
  }
  lengths.forEach((length, symbol) => {
    if (length) codes[symbol] = next[length]++;
  });
  return codes;
}

/**
 * A stream of symbols, the last one first.
 * @param {Uint8Array} symbols
 * @param {Uint8Array} lengths
 * @param {Uint16Array} codes
 */
function coded(symbols, lengths, codes) {
  const bits = new Bits();
  for (let i = symbols.length - 1; i >= 0; i--) bits.add(codes[symbols[i]], lengths[symbols[i]]);
  return bits.endMarked();
}

/**
 * Description of the codes; null where there is none for so many.
 * @param {Uint8Array} lengths
 */
function treeOf(lengths) {
  const longest = Math.max(...lengths), last = lengths.findLastIndex(Boolean);
  const weights = lengths.subarray(0, last).map((length) => (length ? longest + 1 - length : 0)); // that of the last one follows
  const compressed = weights.length > 2 && weights.some((weight) => weight !== weights[0]) ? compressedWeights(weights) : null;
  if (compressed && compressed.length < MOST_DIRECT) return joined([Uint8Array.of(compressed.length), compressed]);
  if (weights.length > MOST_DIRECT) return null;
  const halves = Uint8Array.from({ length: Math.ceil(weights.length / 2) }, (_, i) => (weights[2 * i] << 4) | (weights[2 * i + 1] ?? 0));
  return joined([Uint8Array.of(MOST_DIRECT - 1 + weights.length), halves]);
}

/**
 * Weights coded by finite state entropy, in two states that take turns, after the table of it.
 * @param {Uint8Array} weights
 */
function compressedWeights(weights) {
  const shares = sharesOf(weights), table = tableOf(shares), bits = new Bits();
  /** @type {(number | undefined)[]} */
  const states = [undefined, undefined];
  for (let i = weights.length - 1; i >= 0; i--) {
    const state = states[i % 2], share = shares[weights[i]], places = table[weights[i]];
    if (state === undefined) states[i % 2] = places[0];
    else {
      const most = TABLE_LOG - (share > 1 ? 31 - Math.clz32(share - 1) : 0), count = state >= share << most ? most : most - 1;
      bits.add(state, count);
      states[i % 2] = places[(state >> count) - share];
    }
  }
  for (const state of states.reverse()) bits.add(Number(state), TABLE_LOG);
  return joined([describedShares(shares), bits.endMarked()]);
}

/**
 * Shares of the table by weight, at least 1 for each that is there.
 * @param {Uint8Array} weights
 */
function sharesOf(weights) {
  const size = 1 << TABLE_LOG, shares = new Array(Math.max(...weights) + 1).fill(0);
  for (const weight of weights) shares[weight]++;
  const rounded = shares.map((count) => (count ? Math.max(1, Math.floor((count * size) / weights.length)) : 0));
  rounded[rounded.indexOf(Math.max(...rounded))] += size - rounded.reduce((sum, share) => sum + share, 0);
  return rounded;
}

/**
 * States of each weight, ascending.
 * @param {readonly number[]} shares
 */
function tableOf(shares) {
  const size = 1 << TABLE_LOG, step = (size >> 1) + (size >> 3) + 3, owners = new Uint8Array(size);
  let place = 0;
  shares.forEach((share, weight) => {
    for (let i = 0; i < share; i++, place = (place + step) % size) owners[place] = weight;
  });
  return shares.map((_, weight) => [...owners.keys()].filter((state) => owners[state] === weight).map((state) => size + state));
}

/** @param {readonly number[]} shares */
function describedShares(shares) {
  const bits = new Bits();
  bits.add(TABLE_LOG - 5, 4);
  let left = (1 << TABLE_LOG) + 1, threshold = 1 << TABLE_LOG, width = TABLE_LOG + 1;
  for (let weight = 0; left > 1; ) {
    const share = shares[weight++], most = 2 * threshold - 1 - left;
    left -= share;
    const value = share + 1 >= threshold ? share + 1 + most : share + 1;
    bits.add(value, value < most ? width - 1 : width);
    for (; left < threshold; threshold >>= 1) width--;
    if (share) continue;
    let zeros = 0; // further ones, in groups of up to three
    while (shares[weight + zeros] === 0) zeros++;
    weight += zeros;
    for (; zeros >= 3; zeros -= 3) bits.add(3, 2);
    bits.add(zeros, 2);
  }
  return bits.end();
}
