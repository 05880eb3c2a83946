/** The signature of an update, for a server with a list of clients: an envelope (`fedpara_edge.trust.envelope`). */

import { joined, sha256 } from './digest.js';
import { readTensors } from './tensorfile.js';
import { pythonJson, toHex, toUtf8 } from './text.js';

/** @typedef {import('./text.js').Bytes} Bytes */
/**
 * A key that signs.
 * @typedef {object} Key
 * @property {string} text Public half, as lists of clients have it.
 * @property {string} id Name of the key in envelopes.
 * @property {(bytes: Bytes) => Promise<Bytes>} sign
 */

export const ALGORITHM = 'Ed25519';
const SCHEME = 'ed25519', TYPE = 'application/vnd.fedpara-edge.update+json';

/**
 * @param {CryptoKeyPair} pair
 * @returns {Promise<Key>}
 */
export async function keyOf({ publicKey, privateKey }) {
  const digits = toHex(await crypto.subtle.exportKey('raw', publicKey));
  return {
    text: `${SCHEME}:${digits}`,
    id: await sha256(toUtf8(pythonJson({ keytype: SCHEME, scheme: SCHEME, keyval: { public: digits } }))),
    sign: async (bytes) => new Uint8Array(await crypto.subtle.sign(ALGORITHM, privateKey, bytes)),
  };
}

/**
 * Envelope of an update, in base64 as a request has it; the same one each time.
 * @param {Bytes} update
 * @param {string} run Name of the run.
 * @param {Key} key
 */
export async function signUpdate(update, run, key) {
  const { fingerprint, round, base, client, examples } = readTensors(update, 'update', 'fedpara-edge/update').header;
  const body = toUtf8(pythonJson({ sha256: await sha256(update), run, fingerprint, round, base, client, examples }));
  const signed = joined([toUtf8(`DSSEv1 ${TYPE.length} ${TYPE} ${body.length} `), body]);
  const signatures = [{ keyid: key.id, sig: base64(await key.sign(signed)) }];
  return base64(toUtf8(JSON.stringify({ payload: base64(body), payloadType: TYPE, signatures })));
}

/** @param {Bytes} bytes */
const base64 = (bytes) => btoa(String.fromCharCode(...bytes));
