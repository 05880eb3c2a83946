/** The layout of a model: the tensors that travel, those that stay on the device, and the vectors made of them. */

import { FedparaError } from './errors.js';
import { compareText } from './text.js';
import { entriesOf } from './tensorfile.js';

/** @typedef {import('./tensorfile.js').Floats} Floats */
/** @typedef {{name: string, shape: number[], dtype: string, layer: string, part: string, role: string}} TensorSpec */

/**
 * A layer, as far as a phone needs it.
 * @typedef {object} LayerSpec
 * @property {string} name
 * @property {string} kind
 * @property {number} rank
 * @property {number} scale Scale and rounds of a period, of kind `update` alone, as is
 * @property {number} reset_every
 * @property {number} [base_momentum] momentum of the base; 0 if it is left out.
 */
/** @typedef {{layer: LayerSpec, parts: Record<string, TensorSpec>}} Update A layer of kind `update`, and its tensors. */

/** @param {TensorSpec} tensor */
export const isStatistic = ({ part }) => part === 'mean' || part === 'variance';

/** @param {TensorSpec} tensor */
export const sizeOf = ({ shape }) => entriesOf(shape);

/** @param {readonly TensorSpec[]} tensors */
export const entriesIn = (tensors) => tensors.reduce((sum, tensor) => sum + sizeOf(tensor), 0);

export class Layout {
  /**
   * @param {readonly TensorSpec[]} tensors All tensors of the model, in the order of its `state_dict`.
   * @param {readonly LayerSpec[]} layers All layers.
   */
  constructor(tensors, layers = []) {
    const changing = tensors.filter(({ role }) => role === 'shared' || role === 'personal');
    /** Tensors that travel. */
    this.shared = tensors.filter(({ role }) => role === 'shared');
    /** Tensors that change and stay on the device. */
    this.personal = tensors.filter(({ role }) => role === 'personal');
    /** Tensors that gradients change, in the order of the vector `weights` of the graphs. */
    this.trained = changing.filter((tensor) => !isStatistic(tensor));
    /** Running statistics, in the order of the vector `statistics` of the graphs. */
    this.statistics = changing.filter(isStatistic);
    /** Tensors that travel, in the order of the flat change: by name, running statistics last. */
    this.flat = inOrder(this.shared);
    /** Tensors of whole weights, in that order: those that travel, and what updates are folded into. */
    this.whole = inOrder(tensors.filter(({ role }) => role === 'shared' || role === 'base' || role === 'velocity'));
    /** Tensors of updates that training reads and does not change. */
    this.held = tensors.filter(({ role }) => role === 'base' || role === 'drawn');
    /** Layers whose updates are trained.
     * @type {Update[]} */
    this.updates = layers
      .map((layer) => ({ layer, parts: partsOf(layer, tensors) }))
      .filter(({ layer, parts }) => layer.kind === 'update' && parts['base']?.role === 'base');
  }
}

/** @param {readonly TensorSpec[]} tensors */
function inOrder(tensors) {
  return [...tensors].sort(
    (one, other) => Number(isStatistic(one)) - Number(isStatistic(other)) || compareText(one.name, other.name),
  );
}

/**
 * @param {LayerSpec} layer
 * @param {readonly TensorSpec[]} tensors
 */
const partsOf = (layer, tensors) =>
  Object.fromEntries(tensors.filter((tensor) => tensor.layer === layer.name).map((tensor) => [tensor.part, tensor]));

/**
 * Vector of some tensors, end to end.
 * @param {readonly TensorSpec[]} tensors
 * @param {ReadonlyMap<string, Float32Array>} values
 */
export function flatten(tensors, values) {
  const vector = new Float32Array(entriesIn(tensors));
  let position = 0;
  for (const tensor of tensors) {
    const found = values.get(tensor.name);
    if (found?.length !== sizeOf(tensor)) {
      throw new FedparaError(
        `tensor '${tensor.name}': expected ${sizeOf(tensor)} entries, found ${found?.length ?? 'none'}; ` +
          'use the files of one bundle',
      );
    }
    vector.set(found, position);
    position += found.length;
  }
  return vector;
}

/**
 * Inverse of `flatten`: copies, by name.
 * @param {readonly TensorSpec[]} tensors
 * @param {Float32Array} vector
 * @returns {Floats}
 */
export function unflatten(tensors, vector) {
  /** @type {Floats} */
  const found = new Map();
  let position = 0;
  for (const tensor of tensors) {
    found.set(tensor.name, new Float32Array(vector.subarray(position, position + sizeOf(tensor))));
    position += sizeOf(tensor);
  }
  return found;
}

/**
 * Name of the first tensor with an entry that is NaN or infinite.
 * @param {ReadonlyMap<string, Float32Array>} tensors
 */
export function notFinite(tensors) {
  for (const [name, values] of tensors) if (!values.every(Number.isFinite)) return name;
  return undefined;
}
