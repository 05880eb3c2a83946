/** Recordings of movement, in windows with a label. */

import { HERTZ, readingOf, windowsOf } from '../collecting/motion.js';
import { stayAwake } from './awake.js';
import { chosenClass } from './classes.js';
import { element } from './elements.js';
import { inDigits, wipe, write } from './sentences.js';

/** @typedef {import('../collecting/motion.js').Reading} Reading */
/** @typedef {import('../collecting/source.js').Motion} Motion */
/** @typedef {import('./giving.js').Giving} Giving */

/** Ends the recording that goes on, and gives it. @type {(() => Promise<void>) | null} */
let end = null;

const SECONDS_BEFORE = 3, SILENCE_MS = 3000;

/**
 * @param {Motion} motion
 * @param {Giving} giving
 */
export function offerRecorder(motion, giving) {
  element('record').addEventListener('click', () => {
    if (end) return end();
    let stop = () => {};
    const stopped = new Promise((resolve) => (stop = () => resolve(undefined)));
    const given = giveRecording(motion, giving, stopped).finally(() => (end = null));
    end = () => {
      stop();
      return given;
    };
  });
}

/** End the recording that goes on, if there is one; settled when what was recorded is given. */
export const endRecording = async () => end?.();

/**
 * @param {Motion} motion
 * @param {Giving} giving
 * @param {Promise<unknown>} stopped
 */
async function giveRecording(motion, giving, stopped) {
  const button = element('record'), label = chosenClass();
  if (!(await mayRecord())) return giving.fail('noSensors', 'denied');
  write(button, 'stopRecording');
  const readings = await record(motion, giving, stopped);
  write(button, 'record');
  wipe(element('recorded'));
  if (!readings) return;
  if (!readings.length) return giving.fail('noSensors', 'no events');
  const rows = windowsOf(readings, motion, label);
  if (rows.count) await giving.add(rows);
  else giving.tell('tooShort', { seconds: Math.ceil(motion.steps / HERTZ) });
}

/** Phones of Apple ask, and only where a button was pressed. */
async function mayRecord() {
  const { requestPermission } = /** @type {{requestPermission?: () => Promise<string>}} */ (/** @type {unknown} */ (DeviceMotionEvent));
  return !requestPermission || (await requestPermission().catch(() => 'denied')) === 'granted';
}

/**
 * Readings from some seconds on until it is stopped; null if it was stopped before.
 * @param {Motion} motion
 * @param {Giving} giving
 * @param {Promise<unknown>} stopped
 */
async function record({ steps }, giving, stopped) {
  /** @type {Reading[]} */
  const readings = [];
  const each = steps / HERTZ, letSleep = stayAwake(), recorded = element('recorded');
  const take = (/** @type {DeviceMotionEvent} */ event) => {
    const reading = readingOf(event.timeStamp, event.accelerationIncludingGravity, event.rotationRate);
    if (!reading) return;
    readings.push(reading);
    const seconds = (reading.ms - readings[0].ms) / 1000;
    write(recorded, 'recordedSoFar', { seconds: Math.floor(seconds), count: Math.floor(seconds / each), each: () => inDigits(each, 2) });
  };
  giving.tell('recordingSoon', { seconds: SECONDS_BEFORE });
  const isStopped = await Promise.race([stopped.then(() => true), after(1000 * SECONDS_BEFORE)]);
  if (!isStopped) {
    addEventListener('devicemotion', take);
    giving.tell('recording');
    const silent = after(SILENCE_MS).then(() => (readings.length ? stopped : null));
    await Promise.race([stopped, silent]);
    removeEventListener('devicemotion', take);
  }
  letSleep();
  giving.tell(null);
  return isStopped ? null : readings;
}

/**
 * @param {number} ms
 * @returns {Promise<false>}
 */
const after = (ms) => new Promise((resolve) => setTimeout(() => resolve(false), ms));
