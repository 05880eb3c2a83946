/** A call of a device that keeps its state: trained, or gone on with, to the same update however often it is cut short. */

import { baseOf, sha256 } from './digest.js';
import { groupsFor, isFinished } from './state.js';
import { train } from './training.js';

/** @typedef {import('./state.js').DeviceState} DeviceState */
/** @typedef {import('./text.js').Bytes} Bytes */
/** @typedef {import('./training.js').Call} Call */
/** @typedef {Omit<Call, 'before' | 'progress' | 'client' | 'onRest'> & {dataDigest: string}} KeptCall */
/** @typedef {{update: Bytes, client: string, resumedFromStep: number}} Kept */

/**
 * Train, and commit the update and the state.
 * @param {{ort: import('./engine.js').Ort, zstd: import('./codecs/parts.js').Zstd}} tools
 * @param {DeviceState} state
 * @param {KeptCall} given
 * @param {() => Promise<{save: boolean, stop: boolean}>} rest Asked between two steps, whether to save the progress, and to stop.
 * @returns {Promise<Kept | null>} Null if it was stopped; the same call goes on from there.
 */
export async function trainAndKeep(tools, state, given, rest) {
  const { weights, settings, dataDigest, control } = given;
  await state.settle();
  const call = {
    round: weights.round,
    base: weights.base,
    data: dataDigest,
    engine: 'onnxruntime-web',
    ...settings,
    ...(control ? { control: await baseOf('control', weights.round, control) } : {}),
  };
  const committed = await state.committed(), client = await state.client(), done = await state.update();
  if (isFinished(committed, call) && done && (await sha256(done)) === committed?.update) {
    await state.removeProgress(); // the call had ended but for this
    return { update: done, client, resumedFromStep: 0 };
  }
  const before = groupsFor(committed, call), progress = await state.progressOf(call);
  try {
    const { update, after } = await train(tools, {
      ...given,
      before,
      client,
      progress,
      async onRest(current) {
        const { save, stop } = await rest();
        if (save || stop) await state.saveProgress(call, current());
        if (stop) throw new Stopped();
      },
    });
    await state.commit(call, before, after, update);
    return { update, client, resumedFromStep: progress?.step ?? 0 };
  } catch (error) {
    if (error instanceof Stopped) return null;
    throw error;
  }
}

class Stopped extends Error {}
