/**
 * The page as a folder that any web server can hand out: its modules, and the packages that they need.
 *
 * usage: node build.mjs FOLDER [--compress]    FOLDER is new or a page already; with --compress every file lies there
 * in brotli and gzip as well
 */

import { existsSync } from 'node:fs';
import { copyFile, mkdir, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { argv, exit } from 'node:process';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { brotliCompress, constants, gzip } from 'node:zlib';

const HERE = dirname(fileURLToPath(import.meta.url)), PAGE = /^(?!tsconfig|package).*\.(js|html|css)$/;
const packages = createRequire(import.meta.url);
const [folder, compress] = argv.slice(2);
if (!folder) {
  console.error('build: expected a folder to write to, found none; run: node build.mjs FOLDER');
  exit(2);
}

const ort = dirname(packages.resolve('onnxruntime-web')), zstd = dirname(packages.resolve('@hpcc-js/wasm-zstd'));
/** Files by their places on the page. One binary of onnxruntime serves one thread and several. */
const files = new Map([
  ...['ort.wasm.min.mjs', 'ort-wasm-simd-threaded.mjs', 'ort-wasm-simd-threaded.wasm'].map(
    (name) => /** @type {const} */ ([`vendor/onnxruntime-web/${name}`, join(ort, name)]),
  ),
  ['vendor/zstd.js', join(zstd, 'index.js')],
  ['vendor/zstd.LICENSE', join(zstd, '..', 'LICENSE')],
  ['look.css', join(HERE, '..', '..', 'fedpara_edge', 'serving', 'operator_page', 'look.css')],
  ...(await ownFiles('')),
  ...(await ownFiles('codecs')),
  ...(await ownFiles('collecting')),
  ...(await ownFiles('screen')),
]);
if (existsSync(folder) && !existsSync(join(folder, 'vendor', 'zstd.js'))) {
  console.error(`build: ${folder}: expected a new folder, or a page already, found another; choose another`);
  exit(2);
}
await rm(folder, { recursive: true, force: true });
for (const [name, source] of files) {
  const place = join(folder, name);
  await mkdir(dirname(place), { recursive: true });
  await copyFile(source, place);
  if (compress) await writeCompressed(place);
}

/**
 * @param {string} below
 * @returns {Promise<[string, string][]>}
 */
async function ownFiles(below) {
  const names = await readdir(join(HERE, below));
  return names.filter((name) => PAGE.test(name)).map((name) => [join(below, name), join(HERE, below, name)]);
}

/** @param {string} place */
async function writeCompressed(place) {
  const content = await readFile(place);
  // A quality of 11 would take minutes.
  const params = { [constants.BROTLI_PARAM_QUALITY]: 9, [constants.BROTLI_PARAM_SIZE_HINT]: content.length };
  await writeFile(`${place}.br`, await promisify(brotliCompress)(content, { params }));
  await writeFile(`${place}.gz`, await promisify(gzip)(content, { level: 9 }));
}
