/** SHA-256 digests, of files and of weights. */

import { FedparaError } from './errors.js';
import { bytesOf } from './tensorfile.js';
import { compareText, pythonJson, toHex, toUtf8 } from './text.js';

/** @typedef {import('./text.js').Bytes} Bytes */

/** @param {Bytes} bytes */
export async function sha256(bytes) {
  if (!globalThis.crypto?.subtle) {
    throw new FedparaError('this page: expected a secure connection, found none; open it by https', 'notSecure');
  }
  return toHex(await crypto.subtle.digest('SHA-256', bytes));
}

/**
 * The base to which updates refer (`fedpara_edge.formats.weights`).
 * @param {string} fingerprint
 * @param {number} round
 * @param {import('./tensorfile.js').Floats} tensors
 */
export async function baseOf(fingerprint, round, tensors) {
  const parts = [toUtf8(`${fingerprint} ${round}\n`)];
  for (const name of [...tensors.keys()].sort(compareText)) {
    parts.push(toUtf8(`${name}\0`), bytesOf(/** @type {Float32Array<ArrayBuffer>} */ (tensors.get(name))));
  }
  return sha256(joined(parts));
}

/**
 * A header with the digest of itself, of a file without digested content (`fedpara_edge.storage.digest`).
 * @param {Record<string, any>} header
 */
export async function withDigest(header) {
  return { ...header, digest: await sha256(toUtf8(`${pythonJson(header)}\n`)) };
}

/**
 * @param {readonly Uint8Array[]} parts
 * @returns {Bytes}
 */
export function joined(parts) {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let position = 0;
  for (const part of parts) {
    whole.set(part, position);
    position += part.length;
  }
  return whole;
}
