/** What decides the course of a call: the order of the examples and the seeds, from the call's seed and positions alone. */

import { PCG64, SeedSequence } from './random.js';
import { toUtf8 } from './text.js';

/**
 * Order in which an epoch visits the rows.
 * @param {number} examples
 * @param {number} seed Seed of the call.
 * @param {number} epoch Number of the epoch through all rounds: round · epochs + epoch of the call.
 */
export function epochOrder(examples, seed, epoch) {
  const order = Uint32Array.from({ length: examples }, (_, i) => i);
  new PCG64([seed, epoch]).shuffle(order);
  return order;
}

/**
 * Seed of a step, in [0, 2³¹).
 * @param {number} seed Seed of the call.
 * @param {number} step Number of the step through all rounds: round · steps + step of the call.
 */
export function stepSeed(seed, step) {
  return new SeedSequence([seed, step], [1]).state(1)[0] >>> 1;
}

/**
 * Seed of a micro-batch, in [0, 2³¹): the step's own for the first.
 * @param {number} seed Seed of the step.
 * @param {number} number
 */
export function microBatchSeed(seed, number) {
  return number === 0 ? seed : new SeedSequence([seed, number], [2]).state(1)[0] >>> 1;
}

/**
 * Seed of a codec's random rounding, in [0, 2³²), for a device that keeps no state.
 * @param {number} seed Seed of the call.
 * @param {number} round
 * @param {string} client
 */
export function roundingSeed(seed, round, client) {
  return new SeedSequence([seed, round, crc32(toUtf8(client))], [2]).state(1)[0];
}

/** @param {Uint8Array} bytes */
export function crc32(bytes) {
  let found = 0xffffffff;
  for (const byte of bytes) {
    found ^= byte;
    for (let bit = 0; bit < 8; bit++) found = (found >>> 1) ^ (found & 1 ? 0xedb88320 : 0);
  }
  return ~found >>> 0;
}
