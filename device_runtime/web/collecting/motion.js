/** Readings of accelerometer and gyroscope as windows of equal steps in time. */

/** @typedef {{ms: number, values: readonly number[]}} Reading A time, and accelerations in g and rotations in rad/s. */
/** @typedef {{x: number | null, y: number | null, z: number | null}} Acceleration */
/** @typedef {{alpha: number | null, beta: number | null, gamma: number | null}} Rotation */

/** Readings in a second of a window. Phones give about 60. */
export const HERTZ = 50;
const GRAVITY = 9.80665, DEGREE = Math.PI / 180, LONGEST_GAP_MS = 200;

/**
 * A reading of a `devicemotion` event, whose alpha, beta and gamma turn around x, y and z; null without sensors.
 * @param {number} ms
 * @param {Acceleration | null} acceleration In m/s², with gravity.
 * @param {Rotation | null} rotation In degrees per second.
 * @returns {Reading | null}
 */
export function readingOf(ms, acceleration, rotation) {
  if (acceleration?.x == null || acceleration.y == null || acceleration.z == null) return null;
  const { x, y, z } = acceleration, { alpha, beta, gamma } = rotation ?? { alpha: 0, beta: 0, gamma: 0 };
  const turns = [alpha ?? 0, beta ?? 0, gamma ?? 0].map((degrees) => degrees * DEGREE);
  return { ms, values: [x / GRAVITY, y / GRAVITY, z / GRAVITY, ...turns] };
}

/**
 * All whole windows of a recording with a label, one after the other, none across a gap.
 * @param {readonly Reading[]} readings
 * @param {import('./source.js').Motion} motion
 * @param {number} label
 * @returns {import('./source.js').Rows}
 */
export function windowsOf(readings, { steps, channels, stepsFirst }, label) {
  /** @type {number[]} */
  const x = [];
  let count = 0;
  for (const run of runsOf(readings)) {
    const even = resampled(run);
    for (let start = 0; start + steps <= even.length; start += steps, count++) {
      const window = even.slice(start, start + steps).map((values) => values.slice(0, channels));
      for (const line of stepsFirst ? window : turned(window)) x.push(...line);
    }
  }
  return { count, x, y: new Array(count).fill(label) };
}

/** Readings at equal distances in time, by linear interpolation.
 * @param {readonly Reading[]} run
 * @returns {number[][]}
 */
function resampled(run) {
  /** @type {number[][]} */
  const found = [];
  for (let i = 1; i < run.length; i++) {
    const before = run[i - 1], after = run[i], span = after.ms - before.ms;
    for (let ms; (ms = run[0].ms + (1000 * found.length) / HERTZ) < after.ms; ) {
      const share = (ms - before.ms) / span;
      found.push(before.values.map((value, axis) => value + share * (after.values[axis] - value)));
    }
  }
  return found;
}

/**
 * @param {readonly Reading[]} readings
 * @returns {Reading[][]}
 */
function runsOf(readings) {
  /** @type {Reading[][]} */
  const runs = [];
  readings.forEach((reading, i) => {
    const before = readings[i - 1];
    if (!before || reading.ms - before.ms > LONGEST_GAP_MS) runs.push([]);
    if (!before || reading.ms > before.ms) runs[runs.length - 1].push(reading);
  });
  return runs;
}

/** @param {readonly number[][]} lines */
const turned = (lines) => lines[0].map((_, i) => lines.map((line) => line[i]));
