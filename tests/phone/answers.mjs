/**
 * What the phone's modules make of the test vectors, under Node.
 *
 * usage: node answers.mjs VECTORS ANSWERS    both folders; ANSWERS gets answers.json, and files under the vectors' names
 */

import { mkdir, readFile, writeFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { argv } from 'node:process';

import { interfaceOf, openBundle } from '../../device_runtime/web/bundle.js';
import { decodeChange, encodeChange, findCodec } from '../../device_runtime/web/codecs/codec.js';
import { openData } from '../../device_runtime/web/data.js';
import { withDigest } from '../../device_runtime/web/digest.js';
import { FedparaError } from '../../device_runtime/web/errors.js';
import { groupsIn, tensorsOf } from '../../device_runtime/web/groups.js';
import { Layout } from '../../device_runtime/web/layout.js';
import { epochOrder, microBatchSeed, stepSeed } from '../../device_runtime/web/order.js';
import { SFC64 } from '../../device_runtime/web/random.js';
import { learningRateAt, sumLearningRates } from '../../device_runtime/web/schedule.js';
import { ALGORITHM, keyOf, signUpdate } from '../../device_runtime/web/signing.js';
import { makeSettings } from '../../device_runtime/web/settings.js';
import { readTensors, writeTensors } from '../../device_runtime/web/tensorfile.js';
import { train } from '../../device_runtime/web/training.js';
import { applyChange, readWeights } from '../../device_runtime/web/weights.js';
import { openCall } from './calls.mjs';
import { loadTools, read } from './tools.mjs';

const [vectorFolder, answerFolder] = argv.slice(2), UPDATE = 'fedpara-edge/update', STATE = 'fedpara-edge/device-state';
const tools = await loadTools();
/** @type {Record<string, any[]>} */
const vectors = JSON.parse(await readFile(join(vectorFolder, 'vectors.json'), 'utf8'));

const stored = (/** @type {string} */ path) => read(join(vectorFolder, path));
const bundleAt = (/** @type {string} */ path) => openBundle((name) => stored(join(path, name)));

/**
 * @param {string} path
 * @param {Uint8Array | Float32Array} content
 */
async function write(path, content) {
  await mkdir(dirname(join(answerFolder, path)), { recursive: true });
  await writeFile(join(answerFolder, path), content);
}

/** @param {any} vector */
async function answerData({ data, interface: given }) {
  try {
    const { arrays } = await openData(await stored(data), data, interfaceOf(given));
    return { labels: [...(arrays.get('y')?.values ?? [])].map(Number) };
  } catch (error) {
    if (error instanceof FedparaError) return { labels: null, error: error.message };
    throw error;
  }
}

/** @param {any} vector */
async function answerCodec({ codec, seed, tensors, change, update, decoded }) {
  const flat = new Layout(tensors).flat, values = new Float32Array((await stored(change)).buffer);
  try {
    const encoded = encodeChange(findCodec(codec), flat, values, { seed, zstd: tools.zstd });
    if (update === null) return { error: null };
    const file = readTensors(await stored(update), update, UPDATE);
    const { digest, ...header } = file.header;
    const own = await withDigest({ ...header, codec: encoded.codec, sums: encoded.sums });
    await write(update, writeTensors(encoded.arrays, own));
    await write(decoded, decodeChange(file, update, flat, tools.zstd));
    await write(`${decoded}-by-itself`, encoded.decoded);
    return {};
  } catch (error) {
    if (error instanceof FedparaError && update === null) return { error: error.message };
    throw error;
  }
}

/** @param {any} vector */
async function answerWeights({ bundle: path, weights: name, changes, whole }) {
  const bundle = await bundleAt(path), results = [];
  let weights = await readWeights(await stored(name), name, bundle, tools.zstd);
  const { base } = weights;
  for (const change of changes) {
    weights = await applyChange(weights, await stored(change), change, bundle, tools.zstd);
    results.push(weights.base);
  }
  return { base, results, whole: (await readWeights(await stored(whole), whole, bundle, tools.zstd)).base };
}

/** @param {any} vector */
async function answerCall(vector) {
  const { client, update, before, after } = vector, call = await openCall(vectorFolder, vector, tools);
  const kept = before && readTensors(await stored(before), before, STATE);
  const trained = await train(tools, { ...call, client, before: before ? groupsIn(kept.tensors, 'after') : null });
  await write(update, trained.update);
  if (after) {
    const tensors = tensorsOf(trained.after, 'after', call.bundle.layout);
    await write(after, writeTensors(tensors, { format: STATE, version: 1 }));
  }
  return { steps: trained.steps, losses: trained.losses };
}

/** @param {any} vector */
async function answerRefusal(vector) {
  try {
    await train(tools, { ...(await openCall(vectorFolder, vector, tools)), client: vector.client, before: new Map() });
    return null;
  } catch (error) {
    if (error instanceof FedparaError) return error.message;
    throw error;
  }
}

const PKCS8 = Buffer.from('302e020100300506032b657004220420', 'hex');

/** @param {any} vector */
async function answerSignature({ secret, public: text, update, run }) {
  const [hidden, shown] = [secret, text.split(':')[1]].map((digits) => Uint8Array.from(Buffer.from(digits, 'hex')));
  const key = await keyOf({
    privateKey: await crypto.subtle.importKey('pkcs8', Buffer.concat([PKCS8, hidden]), ALGORITHM, false, ['sign']),
    publicKey: await crypto.subtle.importKey('raw', shown, ALGORITHM, true, ['verify']),
  });
  return { public: key.text, envelope: await signUpdate(await stored(update), run, key) };
}

const answers = {
  orders: vectors['orders'].map(({ examples, seed, epoch }) => [...epochOrder(examples, seed, epoch)]),
  step_seeds: vectors['step_seeds'].map(({ seed, step }) => stepSeed(seed, step)),
  micro_batch_seeds: vectors['micro_batch_seeds'].map(({ seed, number }) => microBatchSeed(seed, number)),
  random_floats: vectors['random_floats'].map(({ seed, values }) => {
    const random = new SFC64(seed);
    return values.map(() => random.float32());
  }),
  rates: vectors['rates'].map(({ settings: given, steps, round }) => {
    const settings = makeSettings(given), rate = (/** @type {number} */ step) => learningRateAt(settings, { step, steps, round });
    return { rates: Array.from({ length: steps }, (_, step) => rate(step)), sum: sumLearningRates(settings, { steps, round }) };
  }),
  data: await inTurn(vectors['data'], answerData),
  codecs: await inTurn(vectors['codecs'], answerCodec),
  weights: await inTurn(vectors['weights'], answerWeights),
  calls: await inTurn(vectors['calls'], answerCall),
  refusals: await inTurn(vectors['refusals'], answerRefusal),
  signatures: await inTurn(vectors['signatures'], answerSignature),
};
await writeFile(join(answerFolder, 'answers.json'), JSON.stringify(answers));

/**
 * @param {any[]} values
 * @param {(value: any) => Promise<any>} f
 */
async function inTurn(values, f) {
  const found = [];
  for (const value of values) found.push(await f(value));
  return found;
}
