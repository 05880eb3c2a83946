/** Random bits of a seed, the same everywhere: SplitMix64 (`fedpara_edge.factors.splitmix`). */

import { sha256 } from './digest.js';
import { toUtf8 } from './text.js';

const STEP = 0x9e3779b97f4a7c15n, FIRST = 0xbf58476d1ce4e5b9n, SECOND = 0x94d049bb133111ebn;

/** @param {bigint} value */
const word = (value) => BigInt.asUintN(64, value);

/**
 * The first bytes from a seed.
 * @param {bigint} seed
 * @param {number} bytes
 */
export function randomBytes(seed, bytes) {
  const found = new BigUint64Array(Math.ceil(bytes / 8));
  for (let i = 0, state = seed; i < found.length; i++) {
    state = word(state + STEP);
    let z = word((state ^ (state >> 30n)) * FIRST);
    z = word((z ^ (z >> 27n)) * SECOND);
    found[i] = z ^ (z >> 31n);
  }
  return new Uint8Array(found.buffer, 0, bytes);
}

/**
 * Seed whose 8 bytes, lowest first, begin the SHA-256 of a text in UTF-8.
 * @param {string} text
 */
export async function seedOf(text) {
  const digits = (await sha256(toUtf8(text))).slice(0, 16).match(/../g) ?? [];
  return BigInt(`0x${digits.reverse().join('')}`);
}
