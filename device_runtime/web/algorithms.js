/** The client's half of the federated algorithms (`fedpara_edge.algorithms.client`): g + μ w + h, and what is kept. */

import { FedparaError } from './errors.js';
import { Float, parseTyped } from './text.js';

/** @typedef {import('./tensorfile.js').Floats} Floats */
/**
 * What a local training starts with.
 * @typedef {object} Start
 * @property {Floats} weights Global weights x, the shared tensors that are trained.
 * @property {Floats} kept What the device kept in its last round; empty for zeros.
 * @property {Floats} control What the server gives besides the weights; empty for zeros.
 * @property {number} rateSum Sum of the learning rates of all steps.
 */
/** @typedef {{mu: number, h: Floats | null}} Term */
/**
 * @typedef {object} Algorithm
 * @property {string | null} group Name under which the device keeps something; null for nothing.
 * @property {boolean} controlled Whether the device needs the server's state of the round.
 * @property {(optimizer: Record<string, any>) => void} checkOptimizer
 * @property {(start: Start) => Term} term
 * @property {(start: Start, sent: Floats) => Floats} keep
 * @property {(start: Start) => Record<string, Float>} metrics
 */

/** @type {Algorithm} */
const PLAIN = {
  group: null,
  controlled: false,
  checkOptimizer() {},
  term: () => ({ mu: 0, h: null }),
  keep: () => new Map(),
  metrics: () => ({}),
};

/** @type {Record<string, {options: Record<string, number>, make: (options: Record<string, number>) => Algorithm}>} */
const ALGORITHMS = {
  fedavg: { options: {}, make: () => PLAIN },
  fedprox: {
    options: { mu: 0.1 },
    make: ({ mu }) => ({ ...PLAIN, term: ({ weights }) => ({ mu, h: scaled(weights, -Math.fround(mu)) }) }),
  },
  scaffold: { options: {}, make: () => SCAFFOLD },
  feddyn: {
    options: { alpha: 0.1 },
    make: ({ alpha }) => ({
      ...PLAIN,
      group: 'dynamic',
      term: ({ weights, kept }) => ({ mu: alpha, h: difference(scaled(weights, -Math.fround(alpha)), kept) }),
      keep: ({ kept }, sent) => mapped(sent, (change, name, i) => at(kept, name, i) - change * alpha),
      metrics: () => ({ alpha: new Float(alpha) }),
    }),
  },
};

/** @type {Algorithm} */
const SCAFFOLD = {
  ...PLAIN,
  group: 'control',
  controlled: true,
  checkOptimizer(optimizer) {
    if (optimizer['name'] !== 'sgd' || optimizer['momentum'] || optimizer['weight_decay']) {
      throw new FedparaError(
        `optimizer: expected plain sgd with algorithm scaffold, found ${JSON.stringify(optimizer)}; ` +
          'export with --optimizer sgd and no momentum, or take feddyn',
      );
    }
  },
  term({ weights, kept, control }) {
    if (!control.size && !kept.size) return { mu: 0, h: null };
    return { mu: 0, h: mapped(weights, (_, name, i) => at(control, name, i) - at(kept, name, i)) };
  },
  keep({ kept, control, rateSum }, sent) {
    return mapped(sent, (change, name, i) => at(kept, name, i) - at(control, name, i) - change / rateSum);
  },
  metrics: ({ rateSum }) => ({ learning_rate_sum: new Float(rateSum) }),
};

/**
 * Algorithm as it is typed, such as `fedprox:mu=0.1`.
 * @param {string} text
 */
export function findAlgorithm(text) {
  const { name, options } = parseTyped(text), known = ALGORITHMS[name];
  const unknown = known && Object.keys(options).find((option) => !(option in known.options));
  if (!known || unknown !== undefined) {
    throw new FedparaError(
      `algorithm: expected one of ${Object.keys(ALGORITHMS).join(', ')}, found ${text}; take one that phones know`,
    );
  }
  const numbers = Object.entries(options).map(([option, value]) => [option, Number(value)]);
  return known.make({ ...known.options, ...Object.fromEntries(numbers) });
}

/**
 * @param {Floats} tensors
 * @param {(value: number, name: string, i: number) => number} f
 * @returns {Floats}
 */
function mapped(tensors, f) {
  return new Map([...tensors].map(([name, values]) => [name, values.map((value, i) => f(value, name, i))]));
}

/**
 * @param {Floats} tensors
 * @param {number} factor
 */
const scaled = (tensors, factor) => mapped(tensors, (value) => factor * value);

/**
 * @param {Floats} tensors
 * @param {Floats} less Zeros where it is empty.
 */
const difference = (tensors, less) => mapped(tensors, (value, name, i) => value - at(less, name, i));

/**
 * @param {Floats} tensors
 * @param {string} name
 * @param {number} i
 */
const at = (tensors, name, i) => tensors.get(name)?.[i] ?? 0;
