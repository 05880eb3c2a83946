/**
 * Updates on their way to the server. A server of `fedpara-edge serve` takes them in pieces, in the IETF's way of
 * resumable uploads (draft-ietf-httpbis-resumable-upload): where an update is being sent to is kept in `upload.json`, as
 * the Python device keeps it, so that a connection that broke, or a page that was closed, goes on where it stopped.
 */

import { request, saidIn, UnreachableError } from './connection.js';
import { sha256 } from './digest.js';
import { FedparaError } from './errors.js';
import { fromUtf8, toUtf8 } from './text.js';

/** @typedef {import('./folder.js').Folder} Folder */
/** @typedef {import('./text.js').Bytes} Bytes */
/**
 * Way to the server.
 * @typedef {object} Way
 * @property {string} address Address that takes updates.
 * @property {Record<string, string>} headers
 * @property {string | null} envelope Signature of the update; null where nobody asks for one.
 * @property {(sent: number) => void} onPiece Called with the number of bytes that are there.
 */

const NOTE = 'upload.json', PARTIAL = 'application/partial-upload';
const SMALLEST_PIECE = 64 << 10, LARGEST_PIECE = 4 << 20, QUICK_MS = 1000;

/**
 * Send an update in one request, to any server.
 * @param {Way} way
 * @param {Bytes} update
 */
export async function sendWhole({ address, headers, envelope, onPiece }, update) {
  const fields = { 'Content-Type': 'application/octet-stream', ...headers, ...sealedBy(envelope) };
  await taken(await request(address, { method: 'POST', body: update, headers: fields }));
  onPiece(update.length);
}

/**
 * Send an update in pieces, from where an earlier call stopped.
 * @param {Folder} folder Folder with the note.
 * @param {Way} way
 * @param {Bytes} update
 */
export async function sendInPieces(folder, { address, headers, envelope, onPiece }, update) {
  const digest = await sha256(update), ask = async (/** @type {string} */ place, /** @type {RequestInit} */ options) =>
    request(new URL(place, address).href, { ...options, headers: { ...headers, ...options.headers } });
  let { location, offset } = await goneOn(folder, digest, ask);
  if (location === null) {
    const fields = { 'Upload-Complete': '?0', 'Upload-Length': String(update.length) };
    const begun = await taken(await ask(address, { method: 'POST', headers: fields }));
    location = begun.headers.get('Location') ?? '';
    await folder.write(NOTE, toUtf8(JSON.stringify({ sha256: digest, location })));
  }
  onPiece(offset);
  for (let size = SMALLEST_PIECE, isLast = false; !isLast; ) {
    const stop = Math.min(offset + size, update.length), begun = performance.now();
    isLast = stop === update.length;
    const piece = { 'Content-Type': PARTIAL, 'Upload-Offset': String(offset), 'Upload-Complete': isLast ? '?1' : '?0' };
    const fields = { ...piece, ...(isLast ? sealedBy(envelope) : {}) };
    const answer = await ask(location, { method: 'PATCH', body: update.subarray(offset, stop), headers: fields });
    if (answer.status === 404 || (!answer.ok && answer.headers.has('Upload-Offset'))) {
      throw new UnreachableError(`the server: expected to go on sending, found ${await saidIn(answer)}; try again`, 'busy');
    }
    await taken(answer);
    onPiece((offset = stop));
    size = performance.now() - begun < QUICK_MS ? Math.min(2 * size, LARGEST_PIECE) : Math.max(size / 2, SMALLEST_PIECE);
  }
}

/**
 * Whether an update was being sent that is not known to have been taken.
 * @param {Folder} folder
 * @param {Bytes | null} update
 */
export async function isUnsent(folder, update) {
  const note = update && (await readNote(folder));
  return !!note && note.sha256 === (await sha256(update));
}

/**
 * Forget the way of an update that was taken or refused.
 * @param {Folder} folder
 */
export const forget = (folder) => folder.remove(NOTE);

/**
 * Fields of the request that completes an update.
 * @param {string | null} envelope
 * @returns {Record<string, string>}
 */
const sealedBy = (envelope) => (envelope === null ? {} : { 'Update-Envelope': envelope });

/**
 * Address of an upload that was begun, and how much of it is there.
 * @param {Folder} folder
 * @param {string} digest
 * @param {(place: string, options: RequestInit) => Promise<Response>} ask
 * @returns {Promise<{location: string | null, offset: number}>}
 */
async function goneOn(folder, digest, ask) {
  const note = await readNote(folder);
  if (note?.sha256 === digest) {
    const found = await ask(note.location, { method: 'HEAD' }), offset = found.headers.get('Upload-Offset');
    if (found.ok && offset !== null && /^\d+$/.test(offset)) return { location: note.location, offset: Number(offset) };
  }
  return { location: null, offset: 0 };
}

/**
 * @param {Folder} folder
 * @returns {Promise<{sha256: string, location: string} | null>}
 */
async function readNote(folder) {
  const found = await folder.read(NOTE);
  return found && JSON.parse(fromUtf8(found));
}

/**
 * An answer that is no refusal.
 * @param {Response} response
 */
async function taken(response) {
  if (response.ok) return response;
  const message = `the server: expected to take the update, found ${await saidIn(response)}`;
  throw new FedparaError(message, response.status === 409 ? 'late' : 'refused');
}
