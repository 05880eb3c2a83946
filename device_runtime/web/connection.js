/** Requests to the page's own server, and what its answers mean. */

import { FedparaError } from './errors.js';

/** The server can't be reached, or asks for patience: the same request later. */
export class UnreachableError extends FedparaError {}

/** The server knows this phone no longer, or not yet. */
export class NotJoinedError extends FedparaError {}

const PATIENCE = [408, 425, 429, 502, 503, 504];

/**
 * An answer, whatever its status.
 * @param {string} address
 * @param {RequestInit} options
 */
export async function request(address, options) {
  const response = await fetch(address, options).catch(() => {
    throw new UnreachableError(
      `${nameOf(address)}: expected an answer of the server, found none; try again when there is a connection`,
      'noConnection',
    );
  });
  if (response.status === 401) {
    throw new NotJoinedError(
      'this page: expected a phone that has joined, found another; open the link, or scan the code, to join',
      'notJoined',
    );
  }
  if (PATIENCE.includes(response.status)) {
    throw new UnreachableError(`the server: expected an answer, found ${await saidIn(response)}; try again later`, 'busy');
  }
  return response;
}

/**
 * Content of a file of the server.
 * @param {string} address
 * @param {RequestInit} options
 */
export async function fetched(address, options) {
  const response = await request(address, options);
  if (!response.ok) {
    throw new FedparaError(
      `${nameOf(address)}: expected a file on the server, found ${response.status} ${response.statusText}; tell who runs it`,
      'missingFile',
    );
  }
  const content = await response.arrayBuffer().catch(() => {
    throw new UnreachableError(`${nameOf(address)}: expected the whole file, found a part; try again`, 'noConnection');
  });
  return new Uint8Array(content);
}

/**
 * Status of an answer, and its sentence where it has one.
 * @param {Response} response
 */
export async function saidIn(response) {
  const isPlain = response.headers.get('Content-Type')?.startsWith('text/plain');
  const said = isPlain ? (await response.text().catch(() => '')).trim().slice(0, 200) : response.statusText;
  return `${response.status}: ${said}`;
}

/** @param {string} address */
const nameOf = (address) => decodeURIComponent(new URL(address).pathname);
