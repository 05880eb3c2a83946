/** The page: examples are picked, training begins, and the update is sent when the person says so. */

import { FedparaError } from './errors.js';
import { checkBrowser } from './support.js';

/** @typedef {import('./worker.js').Reply} Reply */
/** @typedef {import('./worker.js').Request} Request */

/**
 * @param {string} id
 * @returns {any}
 */
const element = (id) => document.getElementById(id);
const [file, start, pause, send, save, clear] = ['file', 'start', 'pause', 'send', 'save', 'clear'].map(element);
const MOST_POINTS = 200, AGAIN_MS = 1000;
const task = new URL('task.json', document.baseURI).href;

/** @type {number[]} */
let losses = [];
/** @type {Uint8Array<ArrayBuffer> | null} */
let update = null;
/** @type {string | null} */
let updates = null;
/** @type {Record<string, string>} */
let headers = {};
/** Whether a server of `fedpara-edge serve` says when there is something to train. */
let isServed = false;
/** @type {Worker | undefined} */
let worker;

/** @param {Request} request */
const ask = (request) => worker?.postMessage(request);

/**
 * @param {string} id
 * @param {string} text
 */
function show(id, text) {
  element(id).textContent = text;
  element(id).hidden = text === '';
}

/** @param {number} bytes */
const size = (bytes) => (bytes < 1e6 ? `${(bytes / 1e3).toFixed(1)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);

/** @param {'loading' | 'waiting' | 'ready' | 'training' | 'done'} now */
function enter(now) {
  document.body.dataset['now'] = now;
  file.disabled = now === 'loading' || now === 'training';
  start.disabled = now === 'loading' || now === 'waiting' || now === 'training' || !file.files?.length;
  pause.hidden = now !== 'training';
  element('result').hidden = now !== 'done';
  clear.disabled = now === 'training';
}

/** @param {Reply} reply */
function take(reply) {
  switch (reply.kind) {
    case 'ready': {
      updates = reply.updates;
      headers = reply.headers;
      isServed = reply.phase !== null;
      const model = `${reply.model}, round ${reply.round + 1}`, entries = reply.entries.toLocaleString('en');
      show('model', `${model}: ${reply.reason ?? `${entries} numbers learn from your examples`}.`);
      send.hidden = updates === null;
      if (document.body.dataset['now'] === 'waiting') show('error', '');
      enter(reply.reason === null ? 'ready' : 'waiting');
      if (reply.reason !== null && reply.phase !== 'finished') setTimeout(waitForRound, AGAIN_MS);
      break;
    }
    case 'step':
      losses.push(reply.loss);
      element('progress').max = reply.steps;
      element('progress').value = reply.step;
      show('status', `Step ${reply.step} of ${reply.steps}, loss ${reply.loss.toPrecision(3)}`);
      draw();
      break;
    case 'done': {
      const from = reply.resumedFromStep;
      update = reply.update;
      save.href = URL.createObjectURL(new Blob([update], { type: 'application/octet-stream' }));
      show('status', `Trained in ${reply.seconds.toFixed(1)} s${from ? `, from step ${from} on` : ''}.`);
      show('size', `Ready to send: ${size(update.length)}, how the model changed, and none of your examples.`);
      enter('done');
      break;
    }
    case 'stopped':
      show('status', 'Paused. It goes on from here, also after this page was closed.');
      enter('ready');
      break;
    case 'cleared':
      show('status', 'Everything that this page kept is deleted.');
      enter('ready');
      break;
    case 'failed':
      fail(reply.message);
  }
}

/** @param {string} message */
function fail(message) {
  show('error', message);
  if (document.body.dataset['now'] === 'waiting') setTimeout(waitForRound, 5 * AGAIN_MS);
  else if (document.body.dataset['now'] !== 'loading') enter('ready');
}

/** The loss so far, thinned out to what can be seen. */
function draw() {
  const every = Math.ceil(losses.length / MOST_POINTS), shown = losses.filter((_, i) => i % every === 0);
  const top = Math.max(...shown), bottom = Math.min(...shown), range = top - bottom || 1;
  const points = shown.map((loss, i) => `${(100 * i) / Math.max(shown.length - 1, 1)},${38 - (36 * (loss - bottom)) / range}`);
  element('curve').setAttribute('points', points.join(' '));
}

async function sendUpdate() {
  if (!update || !updates) return;
  send.disabled = true;
  show('error', '');
  try {
    const fields = { 'Content-Type': 'application/octet-stream', ...headers };
    const response = await fetch(updates, { method: 'POST', body: update, headers: fields });
    if (!response.ok) {
      const isPlain = response.headers.get('Content-Type')?.startsWith('text/plain');
      const said = isPlain ? (await response.text()).slice(0, 200) : response.statusText;
      throw new FedparaError(`the server: expected to take the update, found ${response.status}: ${said}`);
    }
    show('status', `Sent ${size(update.length)}. Thank you.`);
    element('result').hidden = true;
    if (isServed) waitForRound();
  } catch (error) {
    const message = error instanceof FedparaError ? error.message : 'no connection: the update is kept; send it later';
    fail(message);
    enter('done');
  }
  send.disabled = false;
}

/** Have the page ready for the next round, once there is one. */
function waitForRound() {
  enter('waiting');
  ask({ kind: 'open', task, wait: true });
}

/** The token of the link by which the page was opened, which is taken out of the address. */
function joinToken() {
  const token = new URLSearchParams(location.hash.slice(1)).get('join');
  if (token) history.replaceState(null, '', location.pathname + location.search);
  return token;
}

async function askForPersistence() {
  const granted = await navigator.storage.persist().catch(() => false);
  const refused = 'The browser may delete it when the phone runs out of storage.';
  show('persistence', `What is trained is kept on this phone. ${granted ? '' : refused}`);
}

file.addEventListener('change', () => enter(document.body.dataset['now'] === 'waiting' ? 'waiting' : 'ready'));
start.addEventListener('click', () => {
  losses = [];
  document.body.dataset['begun'] = '';
  show('error', '');
  show('status', 'Reading your examples…');
  enter('training');
  askForPersistence();
  ask({ kind: 'train', file: file.files[0] });
});
pause.addEventListener('click', () => ask({ kind: 'stop' }));
send.addEventListener('click', sendUpdate);
clear.addEventListener('click', () => ask({ kind: 'clear' }));
document.addEventListener('visibilitychange', () => {
  if (document.visibilityState === 'hidden') ask({ kind: 'save' });
});

try {
  enter('loading');
  checkBrowser();
  worker = new Worker(new URL('./worker.js', import.meta.url), { type: 'module' });
  worker.onmessage = ({ data }) => take(data);
  worker.onerror = () => fail('this page: expected to load whole, found a part missing; load it again');
  ask({ kind: 'open', task, join: joinToken() });
} catch (error) {
  fail(error instanceof Error ? error.message : String(error));
}
