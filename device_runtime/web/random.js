/** numpy's random numbers, to the bit: SeedSequence, PCG64 with `Generator.shuffle`, and SFC64 with float32 in [0, 1). */

const POOL = 4;
const INIT_A = 0x43b0d7e5, MULT_A = 0x931e8875, INIT_B = 0x8b51f9dd, MULT_B = 0x58f38ded;
const MIX_LEFT = 0xca01f9dd, MIX_RIGHT = 0x4973f715;

/**
 * @param {number} one
 * @param {number} other
 */
const multiply = (one, other) => Math.imul(one, other) >>> 0;

/** @param {number} value */
const folded = (value) => (value ^ (value >>> 16)) >>> 0;

/**
 * Words of natural numbers, the least significant first, end to end; at least one a number.
 * @param {readonly number[]} values
 */
function wordsOf(values) {
  return values.flatMap((value) => {
    const words = [];
    let left = BigInt(value);
    do {
      words.push(Number(left & 0xffffffffn));
      left >>= 32n;
    } while (left);
    return words;
  });
}

/** `numpy.random.SeedSequence(entropy, spawn_key=…)`. */
export class SeedSequence {
  /**
   * @param {readonly number[]} entropy
   * @param {readonly number[]} spawnKey
   */
  constructor(entropy, spawnKey = []) {
    const words = wordsOf(entropy);
    while (spawnKey.length && words.length < POOL) words.push(0);
    words.push(...wordsOf(spawnKey));
    let constant = INIT_A;
    const hash = (/** @type {number} */ value) => {
      const mixed = (value ^ constant) >>> 0;
      constant = multiply(constant, MULT_A);
      return folded(multiply(mixed, constant));
    };
    const mix = (/** @type {number} */ one, /** @type {number} */ other) =>
      folded((multiply(MIX_LEFT, one) - multiply(MIX_RIGHT, other)) >>> 0);
    const pool = Array.from({ length: POOL }, (_, i) => hash(words[i] ?? 0));
    for (let from = 0; from < POOL; from++) {
      for (let to = 0; to < POOL; to++) if (from !== to) pool[to] = mix(pool[to], hash(pool[from]));
    }
    for (const word of words.slice(POOL)) {
      for (let to = 0; to < POOL; to++) pool[to] = mix(pool[to], hash(word));
    }
    this._pool = pool;
  }

  /**
   * `generate_state(count)`: words of 32 bits.
   * @param {number} count
   */
  state(count) {
    let constant = INIT_B;
    return Uint32Array.from({ length: count }, (_, i) => {
      const mixed = (this._pool[i % POOL] ^ constant) >>> 0;
      constant = multiply(constant, MULT_B);
      return folded(multiply(mixed, constant));
    });
  }
}

const M64 = (1n << 64n) - 1n, M128 = (1n << 128n) - 1n;
const PCG_MULTIPLIER = (2549297995355413924n << 64n) + 4865540595714422341n;

/** `numpy.random.Generator(numpy.random.PCG64(entropy))`, as far as `shuffle` needs it. */
export class PCG64 {
  /** @param {readonly number[]} entropy */
  constructor(entropy) {
    const words = new SeedSequence(entropy).state(8);
    const long = (/** @type {number} */ i) => BigInt(words[2 * i]) | (BigInt(words[2 * i + 1]) << 32n);
    const start = (long(0) << 64n) | long(1);
    this._increment = ((((long(2) << 64n) | long(3)) << 1n) | 1n) & M128;
    this._state = this._increment;
    this._state = (this._state + start) & M128;
    this._advance();
    /** @type {number | null} */
    this._kept = null;
  }

  _advance() {
    this._state = (this._state * PCG_MULTIPLIER + this._increment) & M128;
  }

  _next32() {
    if (this._kept !== null) {
      const kept = this._kept;
      this._kept = null;
      return kept;
    }
    this._advance();
    const value = ((this._state >> 64n) ^ this._state) & M64, turn = this._state >> 122n;
    const turned = ((value >> turn) | (value << ((64n - turn) & 63n))) & M64;
    this._kept = Number(turned >> 32n);
    return Number(turned & 0xffffffffn);
  }

  /**
   * Shuffles in place, as `Generator.shuffle` does: by draws with a mask, again while they are too large.
   * @param {Uint32Array} values
   */
  shuffle(values) {
    for (let last = values.length - 1; last > 0; last--) {
      const mask = 0xffffffff >>> Math.clz32(last);
      let place;
      do place = (this._next32() & mask) >>> 0;
      while (place > last);
      [values[last], values[place]] = [values[place], values[last]];
    }
  }
}

/** `numpy.random.Generator(numpy.random.SFC64(seed))`, as far as `random(dtype=float32)` needs it. */
export class SFC64 {
  /** @param {number} seed */
  constructor(seed) {
    // Four words of 64 bits, the lower half of each first: a, b, c and a counter.
    this._words = new Uint32Array([...new SeedSequence([seed]).state(6), 1, 0]);
    /** @type {number | null} */
    this._kept = null;
    for (let i = 0; i < 12; i++) this._next64();
  }

  /** Advances; the lower half of the value is returned, the upper one left in `_upper`. */
  _next64() {
    const w = this._words;
    const low = w[0] + w[2] + w[6];
    const high = w[1] + w[3] + w[7] + Math.floor(low / 0x100000000);
    const lower = low >>> 0, upper = high >>> 0;
    w[6] += 1;
    if (w[6] === 0) w[7] += 1;
    w[0] = w[2] ^ ((w[2] >>> 11) | (w[3] << 21));
    w[1] = w[3] ^ (w[3] >>> 11);
    const shiftedLow = (w[4] << 3) >>> 0, shiftedHigh = ((w[5] << 3) | (w[4] >>> 29)) >>> 0;
    const sum = w[4] + shiftedLow;
    w[2] = sum;
    w[3] = w[5] + shiftedHigh + Math.floor(sum / 0x100000000);
    const turnedLow = ((w[4] << 24) | (w[5] >>> 8)) >>> 0, turnedHigh = ((w[5] << 24) | (w[4] >>> 8)) >>> 0;
    const total = turnedLow + lower;
    w[4] = total;
    w[5] = turnedHigh + upper + Math.floor(total / 0x100000000);
    this._upper = upper;
    return lower;
  }

  /** Float32 in [0, 1). */
  float32() {
    let word = this._kept;
    if (word === null) {
      word = this._next64();
      this._kept = /** @type {number} */ (this._upper);
    } else this._kept = null;
    return (word >>> 8) / 16777216;
  }
}
