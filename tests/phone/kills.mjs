/**
 * A call that is killed at each of its writes and begun again, under Node.
 *
 * usage: node kills.mjs VECTORS CALL FOLDER    prints, as JSON, the SHA-256 of update and state of the whole call, and those
 * after each kill; the state of the whole call is left in FOLDER/whole
 */

import { cp, mkdir, readdir, readFile, rename, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { argv } from 'node:process';

import { trainAndKeep } from '../../device_runtime/web/device.js';
import { sha256 } from '../../device_runtime/web/digest.js';
import { DeviceState } from '../../device_runtime/web/state.js';
import { openCall } from './calls.mjs';
import { loadTools, read } from './tools.mjs';

const [vectorFolder, name, folder] = argv.slice(2), tools = await loadTools();
const { calls } = JSON.parse(await readFile(join(vectorFolder, 'vectors.json'), 'utf8'));
const vector = calls.find((/** @type {any} */ call) => call.name === name);
const call = await openCall(vectorFolder, vector, tools);

class Killed extends Error {}

/**
 * Folder of the disk, of which the process is killed before a write.
 * @param {string} path
 * @param {number} writes Number of writes that come through.
 * @returns {import('../../device_runtime/web/folder.js').Folder}
 */
function folderAt(path, writes = Infinity) {
  const mayWrite = () => {
    if (writes-- <= 0) throw new Killed();
  };
  return {
    read: (file) => read(join(path, file)).catch(() => null),
    async write(file, content) {
      mayWrite();
      await writeFile(join(path, `${file}.new`), content);
      await rename(join(path, `${file}.new`), join(path, file));
    },
    async move(file, to) {
      mayWrite();
      await rename(join(path, file), join(path, to));
    },
    async remove(file) {
      mayWrite();
      await rm(join(path, file), { force: true });
    },
    list: () => readdir(path),
  };
}

/**
 * @param {string} path
 * @param {number} [writes]
 */
async function run(path, writes) {
  const state = new DeviceState(folderAt(path, writes), call.bundle.fingerprint, call.bundle.layout);
  const kept = await trainAndKeep(tools, state, { ...call, dataDigest: 'data' }, async () => ({ save: true, stop: false }));
  const files = [kept?.update ?? new Uint8Array(), await read(join(path, 'lasting.safetensors'))];
  return { digests: await Promise.all(files.map(sha256)), resumedFromStep: kept?.resumedFromStep };
}

/** @param {string} path */
async function begin(path) {
  await mkdir(path, { recursive: true });
  await writeFile(join(path, 'client'), 'device\n');
  await cp(join(vectorFolder, vector.before), join(path, 'lasting.safetensors'));
}

await begin(join(folder, 'whole'));
const { digests: whole } = await run(join(folder, 'whole'));
/** @type {any[]} */
const torn = [];
for (let writes = 0, killed = true; killed; writes++) {
  const path = join(folder, `killed-${writes}`);
  await begin(path);
  killed = await run(path, writes).then(() => false, (error) => {
    if (error instanceof Killed) return true;
    throw error;
  });
  if (killed) torn.push(await run(path));
}
console.log(JSON.stringify({ whole, torn, again: await run(join(folder, 'whole')) }));
