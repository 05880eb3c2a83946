/** The worker of the page: gets task, bundle and weights from the page's own server, trains, and keeps the state. */

import { openBundle } from './bundle.js';
import { openData } from './data.js';
import { trainAndKeep } from './device.js';
import { sha256 } from './digest.js';
import { FedparaError } from './errors.js';
import { openFolder } from './folder.js';
import { entriesIn } from './layout.js';
import { Member } from './member.js';
import { readControl } from './serverstate.js';
import { makeSettings } from './settings.js';
import { DeviceState } from './state.js';
import { applyChange, readWeights } from './weights.js';

/** @typedef {import('./text.js').Bytes} Bytes */
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
 * @property {string | null} [reason] why this phone is not to train now.
 */
/**
 * `join` is the token of the link by which the page was opened; `wait` asks the server to answer once there is something
 * to train.
 * @typedef {{kind: 'open', task: string, join?: string | null, wait?: boolean} | {kind: 'train', file: File}
 *   | {kind: 'save' | 'stop' | 'clear'}} Request
 */
/**
 * @typedef {{kind: 'ready', model: string, round: number, entries: number, codec: string, updates: string | null,
 *     headers: Record<string, string>, phase: string | null, reason: string | null}
 *   | {kind: 'step', step: number, steps: number, loss: number}
 *   | {kind: 'done', update: Bytes, resumedFromStep: number, seconds: number}
 *   | {kind: 'stopped'} | {kind: 'cleared'} | {kind: 'failed', message: string}} Reply
 */

const SAVE_MS = 10_000, WAIT_SECONDS = 50;
const ZSTD = './vendor/zstd.js', ORT = './vendor/onnxruntime-web/ort.wasm.min.mjs';

/** @param {Reply} reply */
const post = (reply) => postMessage(reply);

/** @type {Promise<Awaited<ReturnType<typeof open>>> | undefined} */
let opened;
const asked = { save: false, stop: false };

addEventListener('message', ({ data: request }) => {
  answer(request).catch((/** @type {unknown} */ error) => {
    const message = error instanceof FedparaError ? error.message : `this page: ${describe(error)}; load it again`;
    post({ kind: 'failed', message });
  });
});

/** @param {Request} request */
async function answer(request) {
  switch (request.kind) {
    case 'open': {
      opened = open(request);
      const { bundle, weights, settings, updates, member, task } = await opened;
      const { model, layout } = bundle, { phase = null, reason = null } = task, { headers } = member;
      const { round } = weights, entries = entriesIn(layout.shared), { codec } = settings;
      return post({ kind: 'ready', model, round, entries, codec, updates, headers, phase, reason });
    }
    case 'train':
      return trainOn(request.file);
    case 'clear': {
      const { bundle, state, member } = await needOpened();
      await alone(bundle.fingerprint, () => state.clear());
      await member.leave();
      return post({ kind: 'cleared' });
    }
    default:
      asked[request.kind] = true;
  }
}

/** @param {{task: string, join?: string | null, wait?: boolean}} request */
async function open({ task: address, join, wait }) {
  const place = (/** @type {string} */ name) => new URL(name, address).href;
  const member = await new Member(await openFolder(['fedpara-edge'])).open();
  if (join) await member.join(place('join'), join);
  const { headers } = member, get = async (/** @type {string} */ name) => fetched(place(name), { headers });
  const asked = { ...headers, ...(wait ? { Prefer: `wait=${WAIT_SECONDS}` } : {}) };
  /** @type {Task} */
  const task = JSON.parse(new TextDecoder().decode(await fetchedAsMember(member, address, { headers: asked, cache: 'no-cache' })));
  const settings = makeSettings(task.settings ?? {}), tools = await loadTools();
  const bundle = await openBundle((name) => get(`${task.bundle.replace(/\/$/, '')}/${name}`));
  let weights = await readWeights(await get(task.weights), task.weights, bundle, tools.zstd);
  for (const change of task.changes ?? []) {
    weights = await applyChange(weights, await get(change), change, bundle, tools.zstd);
  }
  const control = task.control ? readControl(await get(task.control), task.control, bundle, weights) : undefined;
  const folder = await openFolder(['fedpara-edge', bundle.fingerprint.slice(0, 16)]);
  const state = new DeviceState(folder, bundle.fingerprint, bundle.layout, member.client);
  const updates = task.updates ? place(task.updates) : null;
  return { tools, bundle, weights, settings, control, state, updates, member, task };
}

/** @param {File} file */
async function trainOn(file) {
  const { tools, bundle, weights, settings, control, state } = await needOpened();
  const content = new Uint8Array(await file.arrayBuffer()), data = await openData(content, file.name, bundle);
  const dataDigest = await sha256(content), begun = performance.now();
  Object.assign(asked, { save: false, stop: false });
  let saved = begun;
  const rest = async () => {
    await nextTask();
    const save = asked.save || performance.now() - saved > SAVE_MS, { stop } = asked;
    if (save) saved = performance.now();
    asked.save = false;
    return { save, stop };
  };
  const kept = await alone(bundle.fingerprint, () => {
    const onStep = (/** @type {number} */ step, /** @type {number} */ steps, /** @type {number} */ loss) =>
      post({ kind: 'step', step, steps, loss });
    const call = { bundle, weights, data, settings, dataDigest, onStep, ...(control ? { control } : {}) };
    return trainAndKeep(tools, state, call, rest);
  });
  if (!kept) return post({ kind: 'stopped' });
  const { update, resumedFromStep } = kept;
  return post({ kind: 'done', update, resumedFromStep, seconds: (performance.now() - begun) / 1000 });
}

async function needOpened() {
  if (!opened) throw new FedparaError('task: expected to be open, found none; load the page again');
  return opened;
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

class NotJoinedError extends FedparaError {}

/**
 * @param {string} address
 * @param {RequestInit} options
 */
async function fetched(address, options) {
  const name = decodeURIComponent(new URL(address).pathname);
  const response = await fetch(address, options).catch(() => {
    throw new FedparaError(`${name}: expected an answer of the server, found none; try again when there is a connection`);
  });
  if (response.status === 401) {
    throw new NotJoinedError('this page: expected a phone that has joined, found another; open the link, or scan the code, to join');
  }
  if (!response.ok) {
    throw new FedparaError(
      `${name}: expected a file on the server, found ${response.status} ${response.statusText}; tell who runs it`,
    );
  }
  return new Uint8Array(await response.arrayBuffer());
}

/**
 * Run a function while no other tab trains the same bundle.
 * @template T
 * @param {string} fingerprint
 * @param {() => Promise<T>} f
 * @returns {Promise<T>}
 */
async function alone(fingerprint, f) {
  return navigator.locks.request(`fedpara-edge ${fingerprint}`, { ifAvailable: true }, (lock) => {
    if (!lock) throw new FedparaError('this page: expected to train in one tab, found another that trains; close one');
    return f();
  });
}

/** Let messages in: a step waits for nothing that would. */
function nextTask() {
  const { port1, port2 } = new MessageChannel();
  return new Promise((resolve) => {
    port1.onmessage = () => {
      port1.close();
      resolve(undefined);
    };
    port2.postMessage(null);
  });
}

/** @param {unknown} error */
const describe = (error) => (error instanceof Error ? `${error.name}: ${error.message}` : String(error)).replace(/\s+/g, ' ');
