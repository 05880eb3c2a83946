/** The page: examples are given, training begins, and the update is sent when the person says so. */

import { explained } from './errors.js';
import { stayAwake } from './screen/awake.js';
import { showContributions } from './screen/contributed.js';
import { drawCurve } from './screen/curve.js';
import { element, make } from './screen/elements.js';
import { openGiving } from './screen/giving.js';
import { showIdentity } from './screen/identity.js';
import { currentLanguage, inDigits, say, sizeOf, speak, wipe, write } from './screen/sentences.js';
import { LANGUAGES } from './screen/texts.js';
import { checkBrowser } from './support.js';

/** @typedef {import('./screen/sentences.js').Values} Values */
/** @typedef {import('./screen/texts.js').Key} Key */
/** @typedef {import('./worker.js').Reply} Reply */
/** @typedef {import('./worker.js').Request} Request */

const [language, start, pause, send, save, clear] = ['language', 'start', 'pause', 'send', 'save', 'clear'].map(element);
const AGAIN_MS = 1000, AGAIN_AFTER_ERROR_MS = 5000, LOSS_DIGITS = 3;
const task = new URL('task.json', document.baseURI).href;
/** Bits in which a codec stores a number, about. */
const BITS = /** @type {Record<string, number>} */ ({ float32: 32, float16: 16, bfloat16: 16, int8: 8, int4: 4, int3: 3, int2: 2, uniform: 3 });

/** @type {number[]} */
let losses = [];
/** Whether a server of `fedpara-edge serve` says when there is something to train. */
let isServed = false;
/** @type {Worker | undefined} */
let worker;
/** Whether what is said to be wrong is over once the server answers. */
let awaitsServer = false;
/** Ends what keeps the screen on. */
let letSleep = () => {};
/** Timer of the next try to open a round. @type {ReturnType<typeof setTimeout> | undefined} */
let again;
/** The token of the link by which the page was opened, until it has let this phone in. */
let join = joinToken();
/** @type {'loading' | 'waiting' | 'ready' | 'training' | 'done' | 'sending'} */
let now = 'loading';

/** @param {Request} request */
const ask = (request) => worker?.postMessage(request);
const giving = openGiving(ask, fail);
/** The same page in other tabs, which is told that everything was deleted. */
const others = new BroadcastChannel('fedpara-edge');

/** @param {typeof now} next */
function enter(next) {
  if (next !== now) {
    letSleep();
    letSleep = next === 'training' ? stayAwake() : () => {};
  }
  document.body.dataset['now'] = now = next;
  const isBusy = now === 'training' || now === 'sending';
  for (const control of element('giving').querySelectorAll('button:not(#add-text), input, textarea')) control.disabled = isBusy;
  start.disabled = !(now === 'ready' || now === 'done') || !giving.shelf.examples;
  pause.hidden = now !== 'training';
  element('result').hidden = now !== 'done';
  clear.disabled = isBusy;
}

/** @param {Reply} reply */
function take(reply) {
  switch (reply.kind) {
    case 'kept':
      giving.shelf.fill(reply.items);
      showContributions(reply.contributions);
      return enter(now);
    case 'ready':
      return greet(reply);
    case 'added':
      if (reply.item) {
        const { item } = reply;
        if (!giving.shelf.examples) askForPersistence();
        giving.shelf.add(item);
        giving.tell('added', { count: item.rows, what: () => giving.shelf.nameOf(item) });
      } else giving.tell('addedBefore');
      return enter(now === 'done' && reply.item ? 'ready' : now);
    case 'removed': {
      const item = giving.shelf.take(reply.id);
      if (item) giving.tell('removed', { what: () => giving.shelf.nameOf(item) });
      return enter(now === 'done' ? 'ready' : now);
    }
    case 'step':
      losses.push(reply.loss);
      element('progress').max = reply.steps;
      element('progress').value = reply.step;
      write(element('step'), 'step', { step: reply.step, steps: reply.steps, loss: () => inDigits(reply.loss, LOSS_DIGITS) });
      return drawCurve(losses);
    case 'done': {
      const { update, resumedFromStep, seconds } = reply;
      save.href = URL.createObjectURL(new Blob([update], { type: 'application/octet-stream' }));
      inform(resumedFromStep ? 'trainedFrom' : 'trained', { seconds: () => inDigits(seconds, 2), step: resumedFromStep });
      write(element('size'), 'readyToSend', { size: () => sizeOf(update.length) });
      return enter('done');
    }
    case 'stopped':
      inform('paused');
      return enter('ready');
    case 'sending': {
      const { sent, bytes, waitsFor } = reply, values = { sent: () => sizeOf(sent), size: () => sizeOf(bytes) };
      return inform(waitsFor === null ? 'sendingSoFar' : waitsFor === 'noConnection' ? 'sendingWaits' : 'sendingBusy', values);
    }
    case 'sent': {
      const { bytes } = reply.contributions[reply.contributions.length - 1];
      showContributions(reply.contributions);
      inform('sent', { size: () => sizeOf(bytes) });
      return isServed ? waitForRound() : enter('ready');
    }
    case 'cleared':
      others.postMessage('cleared');
      return startOver();
    case 'failed':
      return recover(reply);
  }
}

/** @param {Extract<Reply, {kind: 'ready'}>} reply */
function greet({ model, interface: given, round, entries, codec, canSend, phase, reason, code, unsent, identity }) {
  isServed = phase !== null;
  join = null;
  giving.offer(given);
  const about = { model, round: round + 1, entries, why: () => say(waiting(code ?? phase)) };
  write(element('model'), reason === null ? 'round' : 'roundWaits', about);
  const bytes = (entries * (BITS[codec.split(':')[0]] ?? 32)) / 8, size = () => sizeOf(bytes);
  write(element('what'), canSend ? 'sentWhen' : 'savedWhen', { size });
  send.hidden = !canSend;
  showIdentity(identity, code === 'unlisted');
  if (awaitsServer) calm();
  enter(reason === null ? 'ready' : 'waiting');
  if (unsent) sendUpdate();
  else if (reason !== null && phase !== 'finished') waitForRoundIn(AGAIN_MS);
}

/**
 * The sentence that says why this phone waits.
 * @param {string | null} code
 * @returns {Key}
 */
function waiting(code) {
  /** @type {Record<string, Key>} */
  const sentences = {
    closing: 'waitsClosing',
    paused: 'waitsPaused',
    finished: 'waitsFinished',
    unlisted: 'waitsUnlisted',
    revoked: 'waitsRevoked',
  };
  return sentences[code ?? ''] ?? 'waitsOpen';
}

/** @param {Extract<Reply, {kind: 'failed'}>} reply */
function recover({ doing, message, sentence }) {
  if (doing === 'import') return fail(sentence ?? 'wrongFile', message);
  if (doing === 'send') fail(sentence === 'noConnection' ? 'noConnectionToSend' : sentence, message);
  else fail(sentence, message);
  if (doing === 'open') {
    awaitsServer = true;
    if (now !== 'loading') enter('waiting');
    if (sentence === 'noConnection' || sentence === 'busy' || now === 'waiting') waitForRoundIn(AGAIN_AFTER_ERROR_MS);
  } else if (doing === 'train') enter('ready');
  else if (doing === 'send') {
    // An update that was left by a page before this one can't be shown as a result here: the next open finds it again.
    const isOver = isServed && (sentence === 'late' || sentence === 'refused' || !save.href);
    wipe(element('status'));
    awaitsServer = isOver && sentence === 'otherTab';
    if (isOver) waitForRoundIn(AGAIN_AFTER_ERROR_MS);
    enter(isOver ? 'waiting' : 'done');
  }
}

/**
 * Say what went wrong, in a sentence for anybody, with the exact words for those who want them.
 * @param {Key | null} sentence
 * @param {string} message
 * @param {Values} [values]
 */
function fail(sentence, message, values = {}) {
  const error = element('error');
  if (sentence) write(error, sentence, values);
  else {
    wipe(error);
    error.textContent = message;
  }
  element('detail').textContent = message;
  element('more').hidden = sentence === null || message === '';
  element('trouble').hidden = false;
}

/** Nothing is wrong any more. */
function calm() {
  element('trouble').hidden = true;
  awaitsServer = false;
  wipe(element('error'));
}

/**
 * Say how it goes.
 * @param {Key} key
 * @param {Values} [values]
 */
function inform(key, values = {}) {
  write(element('status'), key, values);
}

function sendUpdate() {
  calm();
  enter('sending');
  ask({ kind: 'send' });
}

/** Have the page ready for the next round, once there is one. */
function waitForRound() {
  if (now !== 'loading') enter('waiting');
  ask({ kind: 'open', task, join, wait: now !== 'loading' });
}

/** @param {number} ms */
function waitForRoundIn(ms) {
  clearTimeout(again);
  again = setTimeout(waitForRound, ms);
}

/** Begin with a new worker: all that another one waits for ends with it. */
function begin() {
  clearTimeout(again);
  worker?.terminate();
  enter('loading');
  worker = new Worker(new URL('./worker.js', import.meta.url), { type: 'module' });
  worker.onmessage = ({ data }) => take(data);
  worker.onerror = () => fail('brokenPage', 'worker.js');
  ask({ kind: 'open', task, join });
}

/** Begin as a page that keeps nothing: everything was deleted, here or in another tab. */
function startOver() {
  giving.shelf.fill([]);
  showContributions([]);
  showIdentity(null, false);
  giving.tell(null);
  wipe(element('step'));
  delete document.body.dataset['begun'];
  save.removeAttribute('href');
  wipe(element('status'));
  write(element('persistence'), 'cleared');
  begin();
}

/** The token of the link by which the page was opened, which is taken out of the address. */
function joinToken() {
  const token = new URLSearchParams(location.hash.slice(1)).get('join');
  if (token) history.replaceState(null, '', location.pathname + location.search);
  return token;
}

async function askForPersistence() {
  const granted = await navigator.storage.persist().catch(() => false);
  write(element('persistence'), granted ? 'kept' : 'keptForNow');
}

start.addEventListener('click', async () => {
  losses = [];
  document.body.dataset['begun'] = '';
  calm();
  inform('reading');
  enter('training');
  askForPersistence();
  pause.disabled = true; // what is asked to stop has to have begun
  await giving.stop();
  pause.disabled = false;
  ask({ kind: 'train' });
});
pause.addEventListener('click', () => ask({ kind: 'stop' }));
send.addEventListener('click', sendUpdate);
clear.addEventListener('click', () => {
  if (confirm(say('clearReally'))) ask({ kind: 'clear' });
});
language.addEventListener('change', () => speak(language.value));
document.addEventListener('visibilitychange', () => {
  ask({ kind: document.visibilityState === 'hidden' ? 'save' : 'look' });
});
// What was wrong is over once a person goes on, and not when what came before is there.
for (const act of ['change', 'click']) element('giving').addEventListener(act, () => awaitsServer || calm(), true);
others.onmessage = startOver;

for (const [code, { name }] of Object.entries(LANGUAGES)) language.append(make('option', { value: code, lang: code }, name));
language.value = currentLanguage();
speak(currentLanguage());
write(element('model'), 'loading');
write(element('where'), 'goes', { host: location.host });
write(element('persistence'), 'kept');
showContributions([]);
try {
  enter('loading');
  checkBrowser();
  begin();
} catch (error) {
  const { sentence, message } = explained(error);
  fail(sentence, message);
}
