/** What the device's modules need from their surroundings, under Node: packages, files and arrays. */

import { readFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';

const { resolve } = createRequire(new URL('../../device_runtime/web/package.json', import.meta.url));

/**
 * @param {string} name
 * @returns {Promise<any>}
 */
const load = (name) => import(pathToFileURL(resolve(name)).href);

/** onnxruntime-web and Zstandard, both in WebAssembly. */
export async function loadTools() {
  const ort = await load('onnxruntime-web'), { Zstd } = await load('@hpcc-js/wasm-zstd');
  ort.env.wasm.numThreads = 1;
  return { ort, zstd: await Zstd.load() };
}

/**
 * @param {string} path
 * @returns {Promise<Uint8Array<ArrayBuffer>>}
 */
export const read = async (path) => new Uint8Array(await readFile(path));
