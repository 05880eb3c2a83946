/** The worker of the page: opens rounds, keeps what is collected, trains, and sends updates. */

import { UnreachableError } from './connection.js';
import { addContribution, readContributions } from './contributions.js';
import { openData } from './data.js';
import { trainAndKeep } from './device.js';
import { explained, FedparaError } from './errors.js';
import { entriesIn } from './layout.js';
import { forgetAll, openRound } from './opened.js';
import { signUpdate } from './signing.js';
import { readTensors } from './tensorfile.js';
import { forget, isUnsent, sendInPieces, sendWhole } from './upload.js';

/** @typedef {import('./collecting/collection.js').Item} Item */
/** @typedef {import('./contributions.js').Contribution} Contribution */
/** @typedef {import('./opened.js').Opened} Opened */
/** @typedef {import('./text.js').Bytes} Bytes */
/**
 * @typedef {({kind: 'open'} & import('./opened.js').Asked) | {kind: 'add', arrays: Map<string, import('./tensorfile.js').Tensor>}
 *   | {kind: 'import', file: File} | {kind: 'remove', id: string} | {kind: 'look' | 'train' | 'save' | 'stop' | 'send' | 'clear'}} Request
 */
/**
 * `unsent` says that an update was being sent when the page was closed.
 * @typedef {{kind: 'ready', model: string, interface: import('./bundle.js').Interface, round: number, entries: number,
 *     codec: string, canSend: boolean, phase: string | null, reason: string | null, code: string | null, unsent: boolean,
 *     identity: import('./screen/identity.js').Identity | null}
 *   | {kind: 'kept', items: Item[], contributions: Contribution[]}
 *   | {kind: 'added', item: Item | null, name: string} | {kind: 'removed', id: string}
 *   | {kind: 'step', step: number, steps: number, loss: number}
 *   | {kind: 'done', update: Bytes, resumedFromStep: number, seconds: number}
 *   | {kind: 'sending', sent: number, bytes: number, waitsFor: string | null} | {kind: 'sent', contributions: Contribution[]}
 *   | {kind: 'stopped'} | {kind: 'cleared'}
 *   | {kind: 'failed', doing: Request['kind'], message: string, sentence: import('./screen/texts.js').Key | null}} Reply
 */

const SAVE_MS = 10_000, FIRST_WAIT_MS = 1000, LONGEST_WAIT_MS = 30_000;

/** @param {Reply} reply */
const post = (reply) => postMessage(reply);

/** @type {Promise<Opened> | undefined} */
let opened;
/** The round that was opened last, whose collection is there while the next one is waited for. @type {Opened | undefined} */
let collecting;
const asked = { save: false, stop: false };

addEventListener('message', ({ data: request }) => {
  answer(request).catch((/** @type {unknown} */ error) => {
    const { message, sentence } = explained(error);
    post({ kind: 'failed', doing: request.kind, message, sentence });
  });
});

/** @param {Request} request */
async function answer(request) {
  switch (request.kind) {
    case 'open':
      opened = openRound(request);
      return tell((collecting = await opened));
    case 'train':
      Object.assign(asked, { save: false, stop: false });
      return train(await needOpened());
    case 'send':
      return send(await needOpened());
    case 'clear':
      return clear();
    case 'look': // another tab may have changed what there is
      return collecting && tellKept(collecting);
    case 'save':
    case 'stop':
      asked[request.kind] = true;
      return;
    default: {
      const { bundle, collection } = collecting ?? (await needOpened());
      return inTurn(() => change(request, bundle, collection));
    }
  }
}

/**
 * Change what was collected.
 * @param {Extract<Request, {kind: 'add' | 'import' | 'remove'}>} request
 * @param {Opened['bundle']} bundle
 * @param {Opened['collection']} collection
 */
async function change(request, bundle, collection) {
  switch (request.kind) {
    case 'add':
      return post({ kind: 'added', item: await collection.add('', request.arrays), name: '' });
    case 'import': {
      const { file } = request, { arrays } = await openData(new Uint8Array(await file.arrayBuffer()), file.name, bundle);
      return post({ kind: 'added', item: await collection.add(file.name, arrays), name: file.name });
    }
    case 'remove':
      await collection.remove(request.id);
      return post({ kind: 'removed', id: request.id });
  }
}

/** @param {Opened} opened */
async function tell({ bundle, weights, settings, updates, state, folder, collection, key, task }) {
  const { model, layout, inputs, heads } = bundle, { round } = weights, { codec } = settings;
  const { phase = null, reason = null, code = null } = task, identity = key && { client: await state.client(), key: key.text };
  const update = await state.update(), unsent = await isUnsent(folder, update);
  await tellKept({ collection, folder });
  const entries = entriesIn(layout.shared), canSend = updates !== null;
  const about = { model, interface: { inputs, heads }, round, entries, codec, canSend, identity };
  post({ kind: 'ready', ...about, phase, reason, code, unsent });
}

/** @param {Pick<Opened, 'collection' | 'folder'>} opened */
async function tellKept({ collection, folder }) {
  await inTurn(async () => post({ kind: 'kept', items: await collection.items(), contributions: await readContributions(folder) }));
}

/** @param {Opened} opened */
async function train({ tools, bundle, weights, settings, control, state, collection }) {
  const { data, digest } = await inTurn(() => collection.open()), begun = performance.now();
  let saved = begun;
  const rest = async () => {
    await nextTask();
    const save = asked.save || performance.now() - saved > SAVE_MS, { stop } = asked;
    if (save) saved = performance.now();
    asked.save = false;
    return { save, stop };
  };
  const kept = await alone('training', () => {
    const onStep = (/** @type {number} */ step, /** @type {number} */ steps, /** @type {number} */ loss) =>
      post({ kind: 'step', step, steps, loss });
    const call = { bundle, weights, data, settings, dataDigest: digest, onStep, ...(control ? { control } : {}) };
    return trainAndKeep(tools, state, call, rest);
  });
  if (!kept) return post({ kind: 'stopped' });
  const { update, resumedFromStep } = kept;
  post({ kind: 'done', update, resumedFromStep, seconds: (performance.now() - begun) / 1000 });
}

/** @param {Opened} opened */
async function send(opened) {
  const { folder } = opened;
  try {
    await alone('sending', () => sendUpdate(opened));
  } catch (error) {
    if (error instanceof FedparaError && !(error instanceof UnreachableError) && error.sentence !== 'otherTab') await forget(folder);
    throw error;
  }
  post({ kind: 'sent', contributions: await readContributions(folder) });
}

/**
 * Send the update of the last call. To a server that takes it in pieces it is sent until it is there or refused.
 * @param {Opened} opened
 */
async function sendUpdate({ state, folder, updates, member: { headers }, key, task }) {
  const update = await state.update();
  if (!update || !updates) throw new FedparaError('update: expected one to send, found none; train first');
  const { header } = readTensors(update, 'update', 'fedpara-edge/update'), bytes = update.length;
  let sent = 0;
  const onPiece = (/** @type {number} */ there) => post({ kind: 'sending', sent: (sent = there), bytes, waitsFor: null });
  const envelope = key && (await signUpdate(update, String(task.run), key));
  const way = { address: updates, headers, envelope, onPiece };
  const untilThere = async () => {
    for (let wait = FIRST_WAIT_MS; ; wait = Math.min(2 * wait, LONGEST_WAIT_MS)) {
      try {
        return await sendInPieces(folder, way, update);
      } catch (error) {
        if (!(error instanceof UnreachableError)) throw error;
        post({ kind: 'sending', sent, bytes, waitsFor: error.sentence });
        await connectionOr(wait);
      }
    }
  };
  await (task.phase ? untilThere() : sendWhole(way, update));
  await addContribution(folder, { round: header['round'], examples: header['examples'], bytes, at: Date.now() });
  await forget(folder);
}

/** Delete all that is kept, unless a tab is at work on it. */
async function clear() {
  await alone('training', () => alone('sending', () => inTurn(forgetAll)));
  post({ kind: 'cleared' });
}

async function needOpened() {
  if (!opened) throw new FedparaError('task: expected to be open, found none; load the page again');
  return opened;
}

/**
 * Run a function on what was collected, after all that were asked for before, in this tab and in others.
 * @template T
 * @param {() => Promise<T>} f
 * @returns {Promise<T>}
 */
async function inTurn(f) {
  return navigator.locks.request('fedpara-edge examples', f);
}

/**
 * Run a function while no other tab does the same.
 * @template T
 * @param {'training' | 'sending'} what
 * @param {() => Promise<T>} f
 * @returns {Promise<T>}
 */
async function alone(what, f) {
  return navigator.locks.request(`fedpara-edge ${what}`, { ifAvailable: true }, (lock) => {
    if (!lock) throw new FedparaError('this page: expected to be at work in one tab, found another that is; close one', 'otherTab');
    return f();
  });
}

/**
 * Wait for some time, or until there is a connection again.
 * @param {number} ms
 */
function connectionOr(ms) {
  return new Promise((resolve) => {
    const timer = setTimeout(end, ms);
    addEventListener('online', end);
    function end() {
      clearTimeout(timer);
      removeEventListener('online', end);
      resolve(undefined);
    }
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
