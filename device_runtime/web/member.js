/**
 * The place of this phone in a federation of `fedpara-edge serve`: joined once, with the token of the link that opened the
 * page, and kept in `member.json`, as the Python device has it. Its key goes with it: a list of clients has the key under
 * the name, and who deletes what the page keeps is not to be known by the key in another place.
 */

import { request, saidIn } from './connection.js';
import { FedparaError } from './errors.js';
import { forgetKey } from './keys.js';
import { fromUtf8, toHex, toUtf8 } from './text.js';

/** @typedef {import('./folder.js').Folder} Folder */

const FILE = 'member.json', SECRET_BYTES = 16;

/** Headers of requests for which no token is needed, or none is there. */
const NONE = {};

export class Member {
  /** @param {Folder} folder */
  constructor(folder) {
    this._folder = folder;
    /** @type {string | null} */
    this.client = null;
    /** @type {Record<string, string>} */
    this.headers = NONE;
  }

  /** Read what was kept; nothing where this phone has not joined. */
  async open() {
    const found = await this._folder.read(FILE);
    if (found) this._take(JSON.parse(fromUtf8(found)));
    return this;
  }

  /**
   * Join, unless this phone has.
   * @param {string} address Address that lets in.
   * @param {string} token Token of the link.
   */
  async join(address, token) {
    await navigator.locks.request('fedpara-edge joining', async () => {
      await this.open(); // another tab may have joined meanwhile
      if (!this.client) await this._join(address, token);
    });
  }

  /**
   * @param {string} address
   * @param {string} token
   */
  async _join(address, token) {
    const kept = await this._folder.read(FILE);
    const secret = kept ? JSON.parse(fromUtf8(kept)).secret : toHex(crypto.getRandomValues(new Uint8Array(SECRET_BYTES)));
    await this._folder.write(FILE, toUtf8(JSON.stringify({ secret }))); // so that a second try is the same device
    const response = await request(address, {
      method: 'POST',
      body: JSON.stringify({ client: null, secret }),
      headers: { 'Content-Type': 'application/json', Authorization: `Bearer ${token}` },
    });
    if (response.status !== 201) {
      throw new FedparaError(`the server: expected to be let in, found ${await saidIn(response)}`, 'notJoined');
    }
    const joined = { secret, ...(await response.json()) };
    await this._folder.write(FILE, toUtf8(JSON.stringify(joined)));
    this._take(joined);
  }

  /** Forget the place and the key; the link lets in again, as another device. */
  async leave() {
    await forgetKey();
    await this._folder.remove(FILE);
    this.client = null;
    this.headers = NONE;
  }

  /** @param {{client?: unknown, token?: unknown}} kept */
  _take({ client, token }) {
    if (typeof client !== 'string' || typeof token !== 'string') return;
    this.client = client;
    this.headers = { Authorization: `Bearer ${token}` };
  }
}
