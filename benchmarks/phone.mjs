/**
 * A headless Chromium for `phone.py`, which does what it is told on the phone's page.
 *
 * usage: node phone.mjs CHROMIUM < ACTIONS    a line of JSON for each action, [action, argument], and one for its answer
 */

import { createRequire } from 'node:module';
import { argv, stdin } from 'node:process';
import { createInterface } from 'node:readline';
import { readFile } from 'node:fs/promises';

const { chromium } = createRequire(new URL('../device_runtime/web/package.json', import.meta.url))('playwright-core');
const [executablePath] = argv.slice(2);
const browser = await chromium.launch({ executablePath, headless: true, args: ['--no-sandbox', '--disable-gpu'] });
const session = await browser.newBrowserCDPSession();
let page = await browser.newPage();

/** @type {Record<string, (argument: any) => Promise<unknown>>} */
const ACTIONS = {
  /** Open a model beside the page's own modules, on one thread as the page does it; the place is its folder. */
  model: async (place) => {
    await page.goto(new URL('/page.css', place).href); // the page's origin and policy, without what it does
    await page.evaluate(openModel, place);
  },
  /** Milliseconds of a step, over some of them. */
  steps: (count) => page.evaluate((/** @type {number} */ n) => /** @type {any} */ (globalThis).takeSteps(n), count),
  /** Seconds from a cold start of the page to the first step of a training: nothing of it is in the browser before. */
  start: async ([link, data]) => {
    await page.context().close();
    page = await (await browser.newContext()).newPage();
    const begun = performance.now();
    await page.goto(link);
    await page.waitForSelector('body[data-now=ready]');
    await page.setInputFiles('#file', data);
    await page.click('#start');
    await page.waitForFunction(() => (document.querySelector('progress')?.value ?? 0) > 0);
    return (performance.now() - begun) / 1000;
  },
  /** Most memory in MiB that a process of a page had resident. */
  memory: async () => {
    const { processInfo } = await session.send('SystemInfo.getProcessInfo');
    const pages = processInfo.filter((/** @type {any} */ { type }) => type === 'renderer');
    const peaks = pages.map(async (/** @type {any} */ { id }) => {
      const status = await readFile(`/proc/${id}/status`, 'utf8').catch(() => '');
      return Number(/VmHWM:\s+(\d+) kB/.exec(status)?.[1] ?? 0) / 1024;
    });
    return Math.max(...(await Promise.all(peaks)));
  },
};

/**
 * Runs on the page.
 * @param {string} place
 */
async function openModel(place) {
  const load = (/** @type {string} */ name) => import(new URL(name, document.baseURI).href);
  const [{ openBundle }, { openData }, { openEngine }, { readWeights }, ort] = await Promise.all(
    ['bundle.js', 'data.js', 'engine.js', 'weights.js', 'vendor/onnxruntime-web/ort.wasm.min.mjs'].map(load),
  );
  Object.assign(ort.env.wasm, { numThreads: 1, wasmPaths: new URL('vendor/onnxruntime-web/', document.baseURI).href });
  const get = async (/** @type {string} */ name) => new Uint8Array(await (await fetch(new URL(name, place))).arrayBuffer());
  const bundle = await openBundle(get), weights = await readWeights(await get('weights.safetensors'), 'weights', bundle, null);
  const data = await openData(await get('data.npz'), 'data.npz', bundle), rows = Uint32Array.from({ length: data.examples }, (_, i) => i);
  const tensors = new Map([...weights.tensors, ...bundle.personal]);
  const engine = await openEngine(ort, bundle, tensors, { maxNorm: Infinity, mu: 0, h: null }), batch = data.rows(rows);
  Object.assign(globalThis, {
    async takeSteps(/** @type {number} */ count) {
      const begun = performance.now();
      for (let step = 0; step < count; step++) await engine.step(batch, { learningRate: 0.01, seed: step, microBatches: 1 });
      return (performance.now() - begun) / count;
    },
  });
}

try {
  for await (const line of createInterface({ input: stdin })) {
    const [action, argument] = JSON.parse(line);
    console.log(JSON.stringify((await ACTIONS[action](argument)) ?? null));
  }
} finally {
  await browser.close();
}
