/** A folder of files that are replaced as a whole or not at all; in the browser, one of the origin private file system. */

import { FedparaError } from './errors.js';

/** @typedef {import('./text.js').Bytes} Bytes */
/**
 * @typedef {object} Folder
 * @property {(name: string) => Promise<Bytes | null>} read Content of a file; null if there is none.
 * @property {(name: string, content: Uint8Array) => Promise<void>} write Replaces a file, or nothing is changed.
 * @property {(name: string, to: string) => Promise<void>} move Replaces a file by another.
 * @property {(name: string) => Promise<void>} remove
 * @property {() => Promise<string[]>} list Names of all files, in any order.
 */

/** What TypeScript's library has for workers only, or not yet.
 * @typedef {object} WritableHandle
 * @property {() => Promise<{truncate(size: number): void, write(bytes: Uint8Array): number, flush(): void, close(): void}>} createSyncAccessHandle
 * @property {(name: string) => Promise<void>} move
 */

/**
 * Folder of the origin private file system, for workers.
 * @param {readonly string[]} path
 * @returns {Promise<Folder>}
 */
export async function openFolder(path) {
  let folder = await storage();
  for (const name of path) folder = await folder.getDirectoryHandle(name, { create: true });
  /** @param {string} name */
  const find = (name) => folder.getFileHandle(name).catch(absent);
  return {
    async read(name) {
      const read = async () => {
        const file = await (await find(name))?.getFile();
        return file ? new Uint8Array(await file.arrayBuffer()) : null;
      };
      return read().catch(read); // another tab may have replaced or removed it in between
    },
    async write(name, content) {
      const temporary = writable(await folder.getFileHandle(`${name}.new`, { create: true }));
      const access = await temporary.createSyncAccessHandle();
      try {
        access.truncate(0);
        access.write(content);
        access.flush();
      } finally {
        access.close();
      }
      await temporary.move(name);
    },
    async move(name, to) {
      await writable(await folder.getFileHandle(name)).move(to);
    },
    async remove(name) {
      await folder.removeEntry(name).catch(absent);
    },
    async list() {
      const names = [];
      for await (const [name, { kind }] of folder.entries()) if (kind === 'file') names.push(name);
      return names;
    },
  };
}

/**
 * Delete a folder with all that is in it.
 * @param {string} name
 */
export async function removeFolder(name) {
  await (await storage()).removeEntry(name, { recursive: true }).catch(absent);
}

async function storage() {
  return navigator.storage.getDirectory().catch(() => {
    throw new FedparaError('this page: expected a place to keep things, found none; leave private browsing', 'noStorage');
  });
}

/** @param {FileSystemFileHandle} handle */
const writable = (handle) => /** @type {WritableHandle} */ (/** @type {unknown} */ (handle));

/** @param {unknown} error */
function absent(error) {
  if (error instanceof DOMException && error.name === 'NotFoundError') return null;
  throw error;
}
