/**
 * What a phone keeps between calls, in the files of `device_runtime.state`, and the update of the last call.
 *
 *     client                 the device's name, made once
 *     lasting.safetensors    committed state: what the last finished call left behind
 *     pending.safetensors    the next committed state, of a call whose update is about to be written
 *     pending.json           {"update": SHA-256 of that update}
 *     progress.safetensors   an unfinished call
 *     update.safetensors     update of the last finished call
 *
 * Cut short between any two writes, the same call again goes on to the same update, and never trains the personal tensors
 * or adds to what an algorithm keeps twice.
 */

import { sha256 } from './digest.js';
import { FedparaError } from './errors.js';
import { groupsIn, tensorsOf } from './groups.js';
import { readTensors, writeTensors } from './tensorfile.js';
import { Float, fromUtf8, pythonJson, toHex, toUtf8 } from './text.js';

/** @typedef {import('./folder.js').Folder} Folder */
/** @typedef {import('./layout.js').Layout} Layout */
/** @typedef {import('./text.js').Bytes} Bytes */
/** @typedef {import('./training.js').Groups} Groups */
/** @typedef {import('./training.js').Progress} Progress */
/** @typedef {Record<string, unknown> & {round: number, base: string}} Identity All that decides the outcome of a call. */
/** @typedef {{call: Identity, update: string, before: Groups, after: Groups}} Committed */

const CLIENT = 'client', UPDATE = 'update.safetensors';
const COMMITTED = 'lasting.safetensors', PENDING = 'pending.safetensors', PROMISE = 'pending.json';
const PROGRESS = 'progress.safetensors';
const STATE_FORMAT = 'fedpara-edge/device-state', PROGRESS_FORMAT = 'fedpara-edge/progress';

/**
 * @param {Identity} one
 * @param {Identity} other
 */
const areSame = (one, other) => pythonJson(one) === pythonJson(other);

export class DeviceState {
  /**
   * @param {Folder} folder
   * @param {string} fingerprint Fingerprint of the bundle whose state it keeps.
   * @param {Layout} layout
   * @param {string | null} [name] Name under which the device joined a federation; one of its own where it joined none.
   */
  constructor(folder, fingerprint, layout, name = null) {
    this._name = name;
    this._folder = folder;
    this._fingerprint = fingerprint;
    this._layout = layout;
  }

  /** Name of the device: the one under which it joined, or 16 random hexadecimal digits. */
  async client() {
    if (this._name) return this._name;
    const found = await this._folder.read(CLIENT);
    if (found) return fromUtf8(found).trim();
    const name = toHex(crypto.getRandomValues(new Uint8Array(8)));
    await this._folder.write(CLIENT, toUtf8(`${name}\n`));
    return name;
  }

  /** Update of the last finished call. */
  async update() {
    return this._folder.read(UPDATE);
  }

  /**
   * Committed state of the last finished call.
   * @returns {Promise<Committed | null>}
   */
  async committed() {
    const found = await this._read(COMMITTED, STATE_FORMAT);
    if (!found) return null;
    const [before, after] = ['before', 'after'].map((moment) => groupsIn(found.tensors, moment));
    return { call: found.header['call'], update: found.header['update'], before, after };
  }

  /**
   * Commit the update of a call and what the call leaves behind: both or neither.
   * @param {Identity} call
   * @param {Groups} before
   * @param {Groups} after
   * @param {Bytes} update
   */
  async commit(call, before, after, update) {
    const digest = await sha256(update);
    const tensors = new Map([...tensorsOf(before, 'before', this._layout), ...tensorsOf(after, 'after', this._layout)]);
    await this._write(PENDING, tensors, { format: STATE_FORMAT, call, update: digest });
    await this._folder.write(PROMISE, toUtf8(JSON.stringify({ update: digest })));
    await this._folder.write(UPDATE, update);
    await this.settle();
    await this.removeProgress();
  }

  /** Commit the pending state, if there is one and its update is in place, and drop it if not. */
  async settle() {
    const [promise, pending] = [await this._folder.read(PROMISE), await this._folder.read(PENDING)];
    if (promise && pending) {
      const update = await this._folder.read(UPDATE);
      if (update && (await sha256(update)) === JSON.parse(fromUtf8(promise)).update) await this._folder.move(PENDING, COMMITTED);
    }
    if (promise) await this._folder.remove(PROMISE);
    if (pending) await this._folder.remove(PENDING);
  }

  /**
   * Progress of an unfinished call, if it is this one; that of another is dropped.
   * @param {Identity} call
   * @returns {Promise<Progress | null>}
   */
  async progressOf(call) {
    const found = await this._read(PROGRESS, PROGRESS_FORMAT);
    if (!found) return null;
    const { header, tensors } = found;
    if (!areSame(header['call'], call)) {
      await this._folder.remove(PROGRESS);
      return null;
    }
    const engine = new Map([...tensors].map(([name, tensor]) => [name.replace(/^engine\//, ''), tensor]));
    return { step: header['step'], lossSums: header['loss_sums'], engine };
  }

  /**
   * Replace the progress.
   * @param {Identity} call
   * @param {Progress} progress
   */
  async saveProgress(call, { step, lossSums, engine }) {
    const tensors = new Map([...engine].map(([name, tensor]) => [`engine/${name}`, tensor]));
    const sums = lossSums.map((sum) => new Float(sum));
    await this._write(PROGRESS, tensors, { format: PROGRESS_FORMAT, call, step, loss_sums: sums });
  }

  /** Delete the progress, if there is any. */
  async removeProgress() {
    await this._folder.remove(PROGRESS);
  }

  /**
   * @param {string} name
   * @param {import('./tensorfile.js').Tensors} tensors
   * @param {object} fields
   */
  async _write(name, tensors, fields) {
    await this._folder.write(name, writeTensors(tensors, { version: 1, fingerprint: this._fingerprint, ...fields }));
  }

  /**
   * @param {string} name
   * @param {string} format
   */
  async _read(name, format) {
    const content = await this._folder.read(name);
    if (!content) return null;
    const found = readTensors(content, name, format), stated = String(found.header['fingerprint']);
    if (stated === this._fingerprint) return found;
    throw new FedparaError(
      `${name}: expected the state of bundle ${this._fingerprint.slice(0, 12)}…, found that of ${stated.slice(0, 12)}…; ` +
        'delete what this page keeps',
    );
  }
}

/**
 * Groups with which a call begins (`device_runtime.state.Committed.start_of`).
 * @param {Committed | null} committed
 * @param {Identity} call
 * @returns {Groups}
 */
export function groupsFor(committed, call) {
  if (!committed) return new Map();
  const { call: last, before, after } = committed;
  const personal = [...after].filter(([name]) => name === 'personal');
  if (areSame(call, last)) return before;
  if (call.round < last.round) return new Map(personal);
  if (call.round === last.round && call.base === last.base) return new Map([...before, ...personal]);
  return after;
}

/**
 * Whether a call is the last one that was finished.
 * @param {Committed | null} committed
 * @param {Identity} call
 */
export const isFinished = (committed, call) => committed !== null && areSame(call, committed.call);
