/**
 * Local training: from a bundle, weights and local data to an update (`device_runtime.training`).
 *
 * The update is a function of the arguments and of what the device keeps, however often the call was interrupted.
 */

import { findAlgorithm } from './algorithms.js';
import { encodeChange, findCodec } from './codecs/codec.js';
import { withDigest } from './digest.js';
import { openEngine } from './engine.js';
import { FedparaError } from './errors.js';
import { flatten, isStatistic, notFinite, unflatten } from './layout.js';
import { epochOrder, roundingSeed, stepSeed } from './order.js';
import { learningRateAt, sumLearningRates } from './schedule.js';
import { countSteps } from './settings.js';
import { writeTensors } from './tensorfile.js';
import { Float } from './text.js';
import { drawnTensors } from './updates.js';

/** @typedef {import('./algorithms.js').Start} Start */
/** @typedef {import('./bundle.js').Bundle} Bundle */
/** @typedef {import('./codecs/parts.js').Zstd} Zstd */
/** @typedef {import('./data.js').Dataset} Dataset */
/** @typedef {import('./engine.js').Engine} Engine */
/** @typedef {import('./settings.js').Settings} Settings */
/** @typedef {import('./tensorfile.js').Floats} Floats */
/** @typedef {import('./text.js').Bytes} Bytes */
/** @typedef {import('./weights.js').Weights} Weights */
/** @typedef {Map<string, Floats>} Groups Groups of tensors that a device keeps. */
/**
 * Progress of a call.
 * @typedef {object} Progress
 * @property {number} step Number of steps taken.
 * @property {number[]} lossSums Sum of the loss over the examples seen, for each epoch begun.
 * @property {ReadonlyMap<string, import('./tensorfile.js').Tensor>} engine State of the engine.
 */
/**
 * A training call.
 * @typedef {object} Call
 * @property {Bundle} bundle
 * @property {Weights} weights
 * @property {Dataset} data
 * @property {Settings} settings
 * @property {string} client Name of the device in the update.
 * @property {Floats} [control] SCAFFOLD's control variate of the server; none for zeros.
 * @property {Groups | null} before Groups that the device keeps; null if it keeps nothing, where lossy codecs round at
 *   random instead.
 * @property {Progress | null} [progress] Progress to go on from.
 * @property {(step: number, steps: number, loss: number) => void} [onStep]
 * @property {(save: () => Progress) => Promise<void>} [onRest] Called between steps, which may save the progress or
 *   throw to interrupt the call.
 */
/** @typedef {{update: Bytes, after: Groups, steps: number, losses: number[]}} Trained */

const PERSONAL = 'personal', RESIDUAL = 'residual';

/**
 * Train and encode the update.
 * @param {{ort: import('./engine.js').Ort, zstd: Zstd}} tools
 * @param {Call} call
 * @returns {Promise<Trained>}
 */
export async function train({ ort, zstd }, call) {
  const { bundle, weights, data, settings, before } = call, { layout } = bundle;
  const algorithm = findAlgorithm(settings.algorithm), codec = findCodec(settings.codec);
  algorithm.checkOptimizer(bundle.optimizer);
  const steps = countSteps(data.examples, settings);
  if (before === null && (layout.personal.length || algorithm.group !== null)) {
    const what = layout.personal.length ? 'personal tensors' : `algorithm ${settings.algorithm}`;
    throw new FedparaError(`${what}: expected a place to keep them, found none; allow this page to store data`);
  }
  if (layout.held.length && algorithm.group !== null) {
    throw new FedparaError(
      'algorithm: expected one that keeps nothing from round to round for a model of kind update, whose factors have ' +
        `other directions each time, such as fedavg or fedprox, found ${settings.algorithm}`,
    );
  }
  const personal = named(layout.personal, before?.get(PERSONAL) ?? bundle.personal);
  const start = {
    weights: named(layout.shared.filter((tensor) => !isStatistic(tensor)), weights.tensors),
    kept: before?.get(algorithm.group ?? '') ?? new Map(),
    control: controlOf(algorithm, call),
    rateSum: sumLearningRates(settings, { steps, round: weights.round }),
  };
  const adjustment = { ...algorithm.term(start), maxNorm: settings.clip_norm ?? Infinity };
  const drawn = await drawnTensors(layout, bundle.fingerprint, weights.round);
  const engine = await openEngine(ort, bundle, new Map([...weights.tensors, ...drawn, ...personal]), adjustment);
  try {
    const lossSums = await takeSteps(engine, call, steps), trained = engine.read();
    const bad = notFinite(trained);
    if (bad !== undefined) throw diverged(`tensor '${bad}'`, 'finite values after the last step', 'NaN or Inf');
    const seen = data.examples - (settings.drop_last ? data.examples % settings.batch_size : 0);
    const losses = lossSums.map((sum) => sum / seen);
    const header = {
      format: 'fedpara-edge/update',
      version: 1,
      fingerprint: bundle.fingerprint,
      round: weights.round,
      base: weights.base,
      client: call.client,
      examples: data.examples,
      steps,
      metrics: { ...inSixDigits(losses), ...algorithm.metrics(start) },
    };
    const change = changeOf(layout.flat, trained, weights.tensors, before?.get(RESIDUAL));
    const isFedBack = before !== null && !layout.held.length;
    const seed = isFedBack ? null : roundingSeed(settings.seed, weights.round, call.client);
    const encoded = encodeChange(codec, layout.flat, change, { seed, zstd });
    const update = writeTensors(encoded.arrays, await withDigest({ ...header, codec: encoded.codec, sums: encoded.sums }));
    const sent = unflatten(layout.flat, encoded.decoded), left = leftOut(layout.flat, unflatten(layout.flat, change), sent);
    /** @type {Groups} */
    const after = new Map([...(before ?? []), [PERSONAL, named(layout.personal, trained)]]);
    if ([...left.values()].some((values) => values.some((value) => value !== 0))) after.set(RESIDUAL, left);
    else after.delete(RESIDUAL);
    if (algorithm.group !== null) {
      const kept = algorithm.keep(start, new Map([...sent].filter(([name]) => start.weights.has(name))));
      const beyond = notFinite(kept);
      if (beyond !== undefined) throw diverged(`tensor '${beyond}'`, 'a finite state of the algorithm', 'another');
      after.set(algorithm.group, kept);
    }
    return { update, after, steps, losses };
  } finally {
    await engine.close();
  }
}

/**
 * Take the steps of a call from its progress on; return the sum of the losses of each epoch.
 * @param {Engine} engine
 * @param {Call} call
 * @param {number} steps
 */
async function takeSteps(engine, { weights: { round }, data, settings, progress, onStep, onRest }, steps) {
  const { batch_size: size, seed, epochs } = settings, perEpoch = steps / epochs;
  const lossSums = [...(progress?.lossSums ?? [])];
  if (progress?.step) engine.restore(progress.engine);
  let order = new Uint32Array();
  for (let number = progress?.step ?? 0, first = true; number < steps; number++, first = false) {
    const epoch = Math.floor(number / perEpoch), batch = number % perEpoch;
    if (first || batch === 0) order = epochOrder(data.examples, seed, round * epochs + epoch);
    const rows = order.subarray(batch * size, (batch + 1) * size);
    const learningRate = learningRateAt(settings, { step: number, steps, round });
    const loss = await engine.step(data.rows(rows), {
      learningRate,
      seed: stepSeed(seed, round * steps + number),
      microBatches: settings.micro_batches,
    });
    if (!Number.isFinite(loss)) throw diverged(`step ${number + 1} of ${steps}`, 'a finite loss', String(loss));
    lossSums[epoch] = (lossSums[epoch] ?? 0) + loss * rows.length;
    onStep?.(number + 1, steps, loss);
    await onRest?.(() => ({ step: number + 1, lossSums: [...lossSums], engine: engine.state() }));
  }
  return lossSums;
}

/**
 * @param {import('./algorithms.js').Algorithm} algorithm
 * @param {Call} call
 * @returns {Floats}
 */
function controlOf(algorithm, { control, weights, settings }) {
  if (control && !algorithm.controlled) {
    throw new FedparaError(`control variate: expected with algorithm scaffold, found ${settings.algorithm}; leave it out`);
  }
  if (!control && algorithm.controlled && weights.round) {
    throw new FedparaError(
      `algorithm ${settings.algorithm}: expected the server's control variate of round ${weights.round}, found none; ` +
        'give the server state of that round',
    );
  }
  return control ?? new Map();
}

/**
 * Change of the shared tensors, in their order: each difference rounded to float32, and then the sum with the residual.
 * @param {readonly import('./layout.js').TensorSpec[]} tensors
 * @param {Floats} trained
 * @param {Floats} origin
 * @param {Floats | undefined} residual
 */
function changeOf(tensors, trained, origin, residual) {
  const old = flatten(tensors, origin), change = flatten(tensors, trained).map((value, i) => value - old[i]);
  const left = residual && flatten(tensors, residual);
  return left ? change.map((value, i) => value + left[i]) : change;
}

/**
 * What a codec left out of a change, for the next one: of running statistics and updates, nothing.
 * @param {readonly import('./layout.js').TensorSpec[]} tensors
 * @param {Floats} change
 * @param {Floats} decoded
 * @returns {Floats}
 */
function leftOut(tensors, change, decoded) {
  return new Map(
    tensors.map((tensor) => {
      const whole = /** @type {Float32Array<ArrayBuffer>} */ (change.get(tensor.name)), sent = decoded.get(tensor.name);
      const isKept = !isStatistic(tensor) && tensor.part !== 'u' && tensor.part !== 'v';
      return [tensor.name, whole.map((value, i) => (isKept ? value - (sent?.[i] ?? 0) : 0))];
    }),
  );
}

/**
 * Some tensors by their specifications.
 * @param {readonly import('./layout.js').TensorSpec[]} tensors
 * @param {Floats} values
 */
const named = (tensors, values) => unflatten(tensors, flatten(tensors, values));

/**
 * Mean losses of the last epoch and, if there are several, of the first, in as many digits as anybody reads.
 * @param {readonly number[]} losses
 */
function inSixDigits(losses) {
  const rounded = (/** @type {number} */ loss) => new Float(Number(loss.toPrecision(6)));
  const last = rounded(losses[losses.length - 1]);
  return losses.length > 1 ? { loss: last, first_epoch_loss: rounded(losses[0]) } : { loss: last };
}

/**
 * @param {string} what
 * @param {string} expected
 * @param {string} found
 */
const diverged = (what, expected, found) =>
  new FedparaError(`${what}: expected ${expected}, found ${found}: the training diverged; lower the learning rate`, 'diverged');
