/**
 * The key with which this phone signs: made once, and kept in IndexedDB in a form of which no script can read the private
 * half. It belongs to the phone's place in the rounds (`member.js`), as a list of clients has it beside the name.
 */

import { FedparaError } from './errors.js';
import { ALGORITHM, keyOf } from './signing.js';

const DATABASE = 'fedpara-edge', STORE = 'keys', OWN = 'own';

/** The key of this phone, which is made if there is none. */
export async function openKey() {
  return keyOf(await navigator.locks.request('fedpara-edge key', async () => (await keptPair()) ?? makePair()));
}

/** Delete the key; the next one is another. */
export async function forgetKey() {
  await inStore('readwrite', (store) => store.delete(OWN));
}

/** @returns {Promise<CryptoKeyPair | undefined>} */
const keptPair = () => inStore('readonly', (store) => store.get(OWN));

async function makePair() {
  const pair = await crypto.subtle.generateKey(ALGORITHM, false, ['sign', 'verify']).catch((/** @type {unknown} */ error) => {
    if (!(error instanceof DOMException && error.name === 'NotSupportedError')) throw error;
    const expected = `this browser: expected ${ALGORITHM}, with which the updates for this server are signed, found none`;
    throw new FedparaError(`${expected}; take Chrome 137, Safari 17 or Firefox 129, or a newer one`, 'noSigning');
  });
  await inStore('readwrite', (store) => store.put(pair, OWN));
  return pair;
}

/**
 * Ask the store for something; what is written is on the disk then.
 * @template T
 * @param {IDBTransactionMode} mode
 * @param {(store: IDBObjectStore) => IDBRequest<T>} ask
 * @returns {Promise<T>}
 */
async function inStore(mode, ask) {
  const database = await openDatabase();
  try {
    const transaction = database.transaction(STORE, mode, { durability: 'strict' }), answer = ask(transaction.objectStore(STORE));
    await new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onabort = () => reject(transaction.error);
    });
    return answer.result;
  } finally {
    database.close();
  }
}

/** @returns {Promise<IDBDatabase>} */
function openDatabase() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(DATABASE);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE);
    request.onsuccess = () => resolve(request.result);
    request.onerror = () =>
      reject(new FedparaError(`this page: expected a place to keep its key, found ${request.error}; leave private browsing`, 'noStorage'));
  });
}
