/** What a browser must have, and a plain sentence where it lacks something. */

import { FedparaError } from './errors.js';

/** A module with one instruction of WebAssembly SIMD. */
const SIMD = Uint8Array.from([
  ...[0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0],
  ...[10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11],
]);

/** Refuse a browser that can't train. */
export function checkBrowser() {
  const update = 'take Chrome 102, Safari 17 or Firefox 113, or a newer one';
  if (!isSecureContext) {
    throw new FedparaError('this page: expected a secure connection, found none; open it by https', 'notSecure');
  }
  /** @type {[string, boolean][]} */
  const needed = [
    ['WebAssembly with SIMD', typeof WebAssembly === 'object' && WebAssembly.validate(SIMD)],
    ['workers', typeof Worker === 'function'],
    ['storage of its own', 'getDirectory' in (navigator.storage ?? {})],
    ['locks', 'locks' in navigator],
    ['DecompressionStream', typeof DecompressionStream === 'function'],
  ];
  const missing = needed.find(([, there]) => !there);
  if (missing) throw new FedparaError(`this browser: expected ${missing[0]}, found none; ${update}`, 'oldBrowser');
}
