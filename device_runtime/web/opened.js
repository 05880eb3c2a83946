/** What a phone trains in a round: task, bundle and weights of the page's own server, and the folders that it keeps. */

import { openBundle } from './bundle.js';
import { Collection, folderName } from './collecting/collection.js';
import { fetched, NotJoinedError } from './connection.js';
import { openFolder, removeFolder } from './folder.js';
import { forgetKey, openKey } from './keys.js';
import { Member } from './member.js';
import { readControl } from './serverstate.js';
import { makeSettings } from './settings.js';
import { DeviceState } from './state.js';
import { applyChange, readWeights } from './weights.js';

/**
 * What a server asks of a phone, `task.json`; URLs are relative to it.
 * @typedef {object} Task
 * @property {string} bundle Folder of the bundle.
 * @property {string} weights Weights file.
 * @property {string[]} [changes] Changes since those weights, in order.
 * @property {string} [control] Server state of the round, for SCAFFOLD.
 * @property {Partial<import('./settings.js').Settings>} [settings]
 * @property {string} [updates] Where to send updates; none to save them as a file alone.
 * @property {string} [phase] Phase of a federation of `fedpara-edge serve`, and
 * @property {string | null} [reason] why this phone is not to train now, and
 * @property {string} [code] the same in one word.
 * @property {string} [run] Name of the run that updates are to be signed for.
 */
/**
 * `join` is the token of the link by which the page was opened; `wait` asks the server to answer once there is something
 * to train.
 * @typedef {{task: string, join?: string | null, wait?: boolean}} Asked
 */
/** @typedef {Awaited<ReturnType<typeof openRound>>} Opened */

const WAIT_SECONDS = 50, ROOT = 'fedpara-edge', COLLECTED = 'collected';
const ZSTD = './vendor/zstd.js', ORT = './vendor/onnxruntime-web/ort.wasm.min.mjs';

/** @param {Asked} asked */
export async function openRound({ task: address, join, wait }) {
  const place = (/** @type {string} */ name) => new URL(name, address).href;
  const member = await new Member(await openFolder([ROOT])).open();
  if (join) await member.join(place('join'), join);
  const { headers } = member, get = async (/** @type {string} */ name) => fetched(place(name), { headers });
  const fields = { ...headers, ...(wait ? { Prefer: `wait=${WAIT_SECONDS}` } : {}) };
  /** @type {Task} */
  const task = JSON.parse(new TextDecoder().decode(await fetchedAsMember(member, address, { headers: fields, cache: 'no-cache' })));
  const settings = makeSettings(task.settings ?? {}), tools = await loadTools();
  const bundle = await openBundle((name) => get(`${task.bundle.replace(/\/$/, '')}/${name}`));
  let weights = await readWeights(await get(task.weights), task.weights, bundle, tools.zstd);
  for (const change of task.changes ?? []) {
    weights = await applyChange(weights, await get(change), change, bundle, tools.zstd);
  }
  const control = task.control ? readControl(await get(task.control), task.control, bundle, weights) : undefined;
  const folder = await openFolder([ROOT, bundle.fingerprint.slice(0, 16)]);
  const state = new DeviceState(folder, bundle.fingerprint, bundle.layout, member.client);
  const collection = new Collection(await openFolder([ROOT, COLLECTED, await folderName(bundle)]), bundle);
  const updates = task.updates ? place(task.updates) : null, key = task.run === undefined ? null : await openKey();
  return { tools, bundle, weights, settings, control, folder, state, collection, updates, member, key, task };
}

/** Delete all that was kept for any round, of any model: examples, states, the place in the rounds, and the key. */
export async function forgetAll() {
  await forgetKey();
  await removeFolder(ROOT);
}

async function loadTools() {
  const ort = await import(ORT), { Zstd } = await import(ZSTD);
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = new URL('./vendor/onnxruntime-web/', import.meta.url).href;
  return { ort, zstd: await Zstd.load() };
}

/**
 * What a member may fetch; a place that the server does not know is left, so that the link lets in again.
 * @param {Member} member
 * @param {string} address
 * @param {RequestInit} options
 */
async function fetchedAsMember(member, address, options) {
  try {
    return await fetched(address, options);
  } catch (error) {
    if (error instanceof NotJoinedError) await member.leave();
    throw error;
  }
}
