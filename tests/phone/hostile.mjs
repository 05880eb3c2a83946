/**
 * Files that were cut short or changed, as the phone's modules read them, under Node.
 *
 * usage: node hostile.mjs VECTORS    prints, as JSON, by kind of file the number of damaged ones, how many of them were
 * refused in a sentence, and every other error
 */

import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { argv } from 'node:process';

import { openBundle } from '../../device_runtime/web/bundle.js';
import { openData } from '../../device_runtime/web/data.js';
import { FedparaError } from '../../device_runtime/web/errors.js';
import { SFC64 } from '../../device_runtime/web/random.js';
import { readControl } from '../../device_runtime/web/serverstate.js';
import { applyChange, readWeights } from '../../device_runtime/web/weights.js';
import { openCall } from './calls.mjs';
import { loadTools, read } from './tools.mjs';

const [folder] = argv.slice(2), tools = await loadTools(), CHANGED = 150;
const vectors = JSON.parse(await readFile(join(folder, 'vectors.json'), 'utf8'));
const stored = (/** @type {string} */ path) => read(join(folder, path));
const random = new SFC64(1), below = (/** @type {number} */ n) => Math.floor(random.float32() * n);
/** @type {Record<string, {files: number, refused: number, errors: string[]}>} */
const found = {};

/**
 * Read a file as it is, and then damaged in many ways.
 * @param {string} kind
 * @param {Uint8Array<ArrayBuffer>} whole
 * @param {(file: Uint8Array<ArrayBuffer>) => unknown} reader
 */
async function tryAll(kind, whole, reader) {
  await reader(whole);
  const damaged = [0, 1, 7, 8, 9, 100, whole.length >> 1, whole.length - 1].map((length) => whole.slice(0, length));
  for (let i = 0; i < CHANGED; i++) {
    const file = whole.slice();
    // Half of the changes in what comes first, as the tables of most files do.
    file[below(i % 2 ? Math.min(600, file.length) : file.length)] = i % 3 ? below(256) : 34 + below(92);
    damaged.push(file);
  }
  const counts = (found[kind] ??= { files: 0, refused: 0, errors: [] });
  for (const file of damaged) {
    counts.files++;
    try {
      await reader(file);
    } catch (error) {
      if (error instanceof FedparaError && !error.message.includes('\n')) counts.refused++;
      else counts.errors.push(error instanceof Error ? String(error.stack) : String(error));
    }
  }
}

for (const { bundle: path, weights: name, changes: [change] } of vectors['weights']) {
  const bundle = await openBundle((file) => stored(join(path, file)));
  const weights = await readWeights(await stored(name), name, bundle, tools.zstd);
  await tryAll('weights', await stored(name), (file) => readWeights(file, name, bundle, tools.zstd));
  if (change) await tryAll('change', await stored(change), (file) => applyChange(weights, file, change, bundle, tools.zstd));
}
const vector = vectors['calls'].find((/** @type {any} */ call) => call.control), call = await openCall(folder, vector, tools);
await tryAll('control', await stored(vector.control), (file) => readControl(file, 'control', call.bundle, call.weights));
for (const { data, bundle: path } of vectors['calls'].slice(0, 2)) {
  const bundle = await openBundle((file) => stored(join(path, file)));
  await tryAll('data', await stored(data), (file) => openData(file, 'data.npz', bundle));
}
for (const name of ['manifest.json', 'local.safetensors', 'train_step.onnx']) {
  const content = await stored(join(vector.bundle, name));
  await tryAll(name, content, (file) =>
    openBundle((other) => (other === name ? Promise.resolve(file) : stored(join(vector.bundle, other)))),
  );
}
console.log(JSON.stringify(found));
