/** The training step `train_step.onnx` on onnxruntime-web, and the vectors that it takes and gives. */

import { FedparaError, isAboutMemory } from './errors.js';
import { entriesIn, flatten, unflatten } from './layout.js';
import { microBatchSeed } from './order.js';
import { entriesOf } from './tensorfile.js';

/** @typedef {typeof import('onnxruntime-web')} Ort onnxruntime-web, which the caller brings. */
/** @typedef {import('onnxruntime-web').Tensor} OrtTensor */
/** @typedef {import('onnxruntime-web').InferenceSession} Session */
/** @typedef {import('./bundle.js').Bundle} Bundle */
/** @typedef {import('./bundle.js').Head} Head */
/** @typedef {import('./data.js').Batch} Batch */
/** @typedef {import('./tensorfile.js').Floats} Floats */
/** @typedef {import('./tensorfile.js').Tensor} Tensor */
/**
 * Adjustment of the gradients, the same in all steps of a call.
 * @typedef {object} Adjustment
 * @property {number} maxNorm Largest norm; infinite for no clipping.
 * @property {number} mu Factor μ of the weights.
 * @property {Floats | null} h Summands h of the shared tensors; null for zeros.
 */

export class Engine {
  /**
   * @param {Ort} ort
   * @param {Session} session
   * @param {Bundle} bundle
   * @param {Floats} tensors Initial values of all tensors that training changes, and those that updates hold.
   * @param {Adjustment} adjustment
   */
  constructor(ort, session, bundle, tensors, { maxNorm, mu, h }) {
    const { layout, heads } = bundle;
    this._ort = ort;
    this._session = session;
    this._bundle = bundle;
    const byHead = heads.length === 1 ? [] : [heads.length];
    /** All that a step changes, under the names that it has in the graph.
     * @type {Record<string, OrtTensor>} */
    this._vectors = {
      weights: this._floats(flatten(layout.trained, tensors)),
      ...(layout.statistics.length ? { statistics: this._floats(flatten(layout.statistics, tensors)) } : {}),
      ...this._freshState(),
    };
    this._settings = {
      share: this._floats(new Float32Array(heads.length), byHead),
      learning_rate: this._floats(Float32Array.of(0), []),
      max_norm: this._floats(Float32Array.of(maxNorm), []),
      last: new ort.Tensor('bool', Uint8Array.of(0), []),
      adjusted: new ort.Tensor('bool', Uint8Array.of(Number(Number.isFinite(maxNorm) || mu !== 0 || h !== null)), []),
      seed: new ort.Tensor('int64', BigInt64Array.of(0n), []),
      mu: this._floats(this._muVector(mu)),
      h: this._floats(h === null ? new Float32Array(1) : this._filled(h)),
    };
    this._nothing = this._floats(new Float32Array(1));
    /** What updates hold, which no step changes. */
    this._held = Object.fromEntries(layout.held.map((spec) => [spec.name, this._floats(flatten([spec], tensors), spec.shape)]));
    this._check();
  }

  /**
   * Take one optimizer step on a batch; return its mean loss before it.
   * @param {Batch} batch
   * @param {{learningRate: number, seed: number, microBatches: number}} options
   */
  async step(batch, { learningRate, seed, microBatches }) {
    const settings = this._settings, byHead = this._bundle.heads;
    const rows = batch.values().next().value?.shape[0] ?? 0, count = Math.min(microBatches, rows);
    this._refuseSplit(count);
    const whole = byHead.map((head) => counted(head, batch));
    /** @type {OrtTensor} */
    let accumulated = count > 1 ? this._floats(new Float32Array(this._vectors['weights'].dims[0])) : this._nothing;
    let loss = 0, start = 0;
    settings.learning_rate.data[0] = learningRate;
    for (let number = 0; number < count; number++) {
      const stop = start + Math.floor(rows / count) + Number(number < rows % count);
      const part = count > 1 ? rowsOf(batch, start, stop) : batch;
      const shares = byHead.map((head, i) => (whole[i] ? counted(head, part) / whole[i] : 0));
      /** @type {Float32Array} */ (settings.share.data).set(shares);
      settings.seed.data[0] = BigInt(microBatchSeed(seed, number));
      settings.last.data[0] = Number(number === count - 1);
      const found = await this._run(part, accumulated, count > 1);
      const losses = /** @type {Float32Array} */ (found['loss'].data);
      losses.forEach((each, i) => (loss += shares[i] * each));
      if (count > 1) accumulated = found['gradient'];
      start = stop;
    }
    return loss;
  }

  /** Copies of the trained tensors and the statistics, by name. */
  read() {
    const { trained, statistics } = this._bundle.layout;
    const kept = this._vectors['statistics'];
    return new Map([
      ...unflatten(trained, /** @type {Float32Array} */ (this._vectors['weights'].data)),
      ...(kept ? unflatten(statistics, /** @type {Float32Array} */ (kept.data)) : []),
    ]);
  }

  /** Weights, statistics and optimizer state, each as one vector.
   * @returns {Map<string, Tensor>} */
  state() {
    const vectors = Object.entries(this._vectors);
    return new Map(
      vectors.map(([name, { dims, data }]) => [
        name,
        { dtype: 'float32', shape: dims, values: new Float32Array(/** @type {Float32Array} */ (data)) },
      ]),
    );
  }

  /**
   * Continue from a state that `state` returned.
   * @param {ReadonlyMap<string, Tensor>} state
   */
  restore(state) {
    for (const [name, { values, shape }] of state) {
      this._vectors[name] = this._floats(new Float32Array(/** @type {Float32Array} */ (values)), shape);
    }
  }

  close() {
    return this._session.release();
  }

  /**
   * @param {Batch} batch
   * @param {OrtTensor} accumulated
   * @param {boolean} gradient Whether to get the gradient, which costs a copy.
   */
  async _run(batch, accumulated, gradient) {
    const feeds = { ...this._vectors, ...this._held, ...this._settings, accumulated, ...this._batchFeeds(batch) };
    const wanted = ['loss', ...(gradient ? ['gradient'] : []), ...Object.keys(this._vectors).map((name) => `new_${name}`)];
    // Outputs are asked for by name: given as allocated tensors they would come back unfilled, without an error.
    const found = await this._session.run(feeds, wanted).catch((/** @type {unknown} */ error) => {
      throw failed(error, batch.values().next().value?.shape[0] ?? 0);
    });
    for (const name of Object.keys(this._vectors)) this._vectors[name] = found[`new_${name}`];
    return found;
  }

  /** @param {Batch} batch */
  _batchFeeds(batch) {
    const { Tensor } = this._ort;
    return Object.fromEntries(
      [...batch].map(([name, { dtype, shape, values }]) => [
        name,
        new Tensor(/** @type {'float32'} */ (dtype), /** @type {Float32Array} */ (values), shape),
      ]),
    );
  }

  /**
   * @param {Float32Array} values
   * @param {readonly number[]} shape
   */
  _floats(values, shape = [values.length]) {
    return new this._ort.Tensor('float32', values, shape);
  }

  /** State of the optimizer before its first step, under the names that it has in the graph.
   * @returns {Record<string, OrtTensor>} */
  _freshState() {
    const { optimizer, layout } = this._bundle, zeros = () => this._floats(new Float32Array(entriesIn(layout.trained)));
    if (optimizer['name'] === 'sgd') return optimizer['momentum'] ? { momentum: zeros() } : {};
    return { moment1: zeros(), moment2: zeros(), steps: this._floats(new Float32Array(1), []) };
  }

  /**
   * Factor μ, for the shared tensors alone where there are personal ones.
   * @param {number} mu
   */
  _muVector(mu) {
    const { trained, personal } = this._bundle.layout;
    if (mu === 0 || !personal.length) return Float32Array.of(mu);
    const of = trained.filter(({ role }) => role === 'shared');
    return this._filled(new Map(of.map(({ name, shape }) => [name, new Float32Array(entriesOf(shape)).fill(mu)])));
  }

  /**
   * Vector of the trained tensors, zero where there is none of a name.
   * @param {Floats} tensors
   */
  _filled(tensors) {
    const { trained } = this._bundle.layout;
    return flatten(
      trained,
      new Map(trained.map((spec) => [spec.name, tensors.get(spec.name) ?? new Float32Array(entriesOf(spec.shape))])),
    );
  }

  /** Refuse a graph with other inputs, and micro-batches where they are wrong.  */
  _check() {
    const { inputs, heads } = this._bundle;
    const expected = [
      ...Object.keys({ ...this._vectors, ...this._held, ...this._settings, accumulated: 0 }),
      ...inputs.map(({ name }) => name),
      ...heads.map(({ label }) => label.name),
    ];
    const found = this._session.inputNames;
    const differing = [...expected, ...found].filter((name) => !(expected.includes(name) && found.includes(name)));
    if (differing.length) {
      throw new FedparaError(
        'train_step.onnx: expected the inputs and outputs that this release knows, found others ' +
          `(${differing.sort().join(', ')}); export again`,
      );
    }
  }

  /** @param {number} count */
  _refuseSplit(count) {
    const { heads, optimizer } = this._bundle, own = heads.find(({ loss }) => loss.options['mean'] === 'false');
    if (count > 1 && (own || optimizer['jacobian_correction'])) {
      throw new FedparaError(
        `micro_batches: expected 1 with ${own ? `the loss ${own.loss.name}` : 'a Jacobian correction'}, which needs ` +
          `whole batches, found ${count}; train with smaller batches`,
      );
    }
  }
}

/**
 * Open a bundle for training.
 * @param {Ort} ort
 * @param {Bundle} bundle
 * @param {Floats} tensors Initial values of all tensors that training changes, and those that updates hold.
 * @param {Adjustment} adjustment
 */
export async function openEngine(ort, bundle, tensors, adjustment) {
  const options = /** @type {const} */ ({
    executionProviders: ['wasm'],
    graphOptimizationLevel: 'extended',
    enableMemPattern: false,
    logSeverityLevel: 4,
  });
  const session = await ort.InferenceSession.create(bundle.step, options).catch((/** @type {unknown} */ error) => {
    throw failed(error, 0);
  });
  return new Engine(ort, session, bundle, tensors, adjustment);
}

/**
 * @param {unknown} error
 * @param {number} rows
 */
function failed(error, rows) {
  const found = String(error instanceof Error ? error.message : error).replace(/\s+/g, ' ');
  const isMemory = isAboutMemory(found);
  const remedy = isMemory
    ? 'close other pages, or train with smaller batches or more micro-batches'
    : 'export a model that takes any number of rows';
  return new FedparaError(
    `train_step.onnx: expected to ${rows ? `run on ${rows} rows` : 'load'}, found ${found}; ${remedy}`,
    isMemory ? 'memory' : null,
  );
}

/**
 * What the loss of a head divides by in a batch (`fedpara_edge.losses.Loss.counted`).
 * @param {Head} head
 * @param {Batch} batch
 */
function counted({ label, loss }, batch) {
  const { shape, values } = /** @type {Tensor} */ (batch.get(label.name));
  const ignored = loss.options['ignore_index'], weights = loss.options['class_weights']?.split(',').map(Number);
  if (loss.name !== 'cross_entropy' || (ignored === undefined && !weights)) return shape[0];
  let sum = 0;
  for (const value of values) {
    if (ignored === undefined || Number(value) !== Number(ignored)) sum += weights ? weights[Number(value)] : 1;
  }
  return sum;
}

/**
 * Consecutive rows of a batch.
 * @param {Batch} batch
 * @param {number} start
 * @param {number} stop
 * @returns {Batch}
 */
function rowsOf(batch, start, stop) {
  return new Map(
    [...batch].map(([name, { dtype, shape, values }]) => {
      const size = entriesOf(shape.slice(1));
      return [name, { dtype, shape: [stop - start, ...shape.slice(1)], values: values.slice(start * size, stop * size) }];
    }),
  );
}
