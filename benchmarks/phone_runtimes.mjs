/**
 * Steps of a model in the page's own modules and in TensorFlow.js, one after the other on the same page.
 *
 * `phone.py` puts this file beside the page, and `phone.mjs` calls it there.
 */

import { openStep } from './tfjs_step.mjs';

const RATE = 0.01;

/** Steps by the names of their runtimes; each gives its loss.
 * @type {Map<string, () => Promise<number>>} */
const runtimes = new Map();

/**
 * Open the bundle of a folder in the page's own modules, on one thread as the page does it.
 * @param {string} name
 * @param {string} place
 */
export async function openOnPage(name, place) {
  const [{ openEngine }, ort] = await Promise.all(['engine.js', 'vendor/onnxruntime-web/ort.wasm.min.mjs'].map(load));
  Object.assign(ort.env.wasm, { numThreads: 1, wasmPaths: new URL('vendor/onnxruntime-web/', document.baseURI).href });
  const { bundle, weights, batch } = await open(place), tensors = new Map([...weights.tensors, ...bundle.personal]);
  const engine = await openEngine(ort, bundle, tensors, { maxNorm: Infinity, mu: 0, h: null });
  runtimes.set(name, () => engine.step(batch, { learningRate: RATE, seed: 0, microBatches: 1 }));
}

/**
 * Open the dense model of a folder in TensorFlow.js, on one thread of a backend.
 * @param {string} name
 * @param {string} place
 * @param {string} backend
 */
export async function openInTfjs(name, place, backend) {
  const { bundle, weights, batch } = await open(place), folder = new URL('.', import.meta.url).href;
  const tensors = new Map(bundle.layout.trained.map(withValues)), x = batch.get('x'), y = batch.get('y');
  const options = { classes: bundle.heads[0].label.classes, learningRate: RATE, folder };
  const step = await openStep(backend, bundle.model, tensors, options);
  runtimes.set(name, async () => step(x, y));

  /** @param {{name: string, shape: number[]}} spec */
  function withValues({ name, shape }) {
    return /** @type {const} */ ([name, { shape, values: weights.tensors.get(name) }]);
  }
}

/**
 * Losses of some steps, and the milliseconds of one.
 * @param {string} name
 * @param {number} count
 */
export async function takeSteps(name, count) {
  const step = /** @type {() => Promise<number>} */ (runtimes.get(name)), losses = [], begun = performance.now();
  for (let number = 0; number < count; number++) losses.push(await step());
  return { losses, ms: (performance.now() - begun) / count };
}

/**
 * Bundle, weights and batch of a folder.
 * @param {string} place
 */
async function open(place) {
  const [{ openBundle }, { openData }, { readWeights }] = await Promise.all(['bundle.js', 'data.js', 'weights.js'].map(load));
  const get = async (/** @type {string} */ file) => new Uint8Array(await (await fetch(new URL(file, place))).arrayBuffer());
  const bundle = await openBundle(get), weights = await readWeights(await get('weights.safetensors'), 'weights', bundle, null);
  const data = await openData(await get('data.npz'), 'data.npz', bundle);
  return { bundle, weights, batch: data.rows(Uint32Array.from({ length: data.examples }, (_, i) => i)) };
}

/**
 * Module of the page.
 * @param {string} file
 */
const load = (file) => import(new URL(file, document.baseURI).href);
