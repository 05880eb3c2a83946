/** What a phone can make examples of, by the interface of a model: images, motion, text, or nothing but files. */

import { entriesOf } from '../tensorfile.js';

/** @typedef {import('../bundle.js').ArraySpec} ArraySpec */
/** @typedef {import('../bundle.js').Interface} Interface */
/** @typedef {import('../tensorfile.js').Tensor} Tensor */
/** @typedef {{kind: 'images', channels: number, height: number, width: number, classes: string[]}} Images */
/** Windows of `steps` readings; `stepsFirst` says whether their shape is [steps, channels] or the other way round.
 * @typedef {{kind: 'motion', steps: number, channels: number, stepsFirst: boolean, classes: string[]}} Motion */
/** Windows of `length` characters; `every` says whether the label is the next character at every position, or the last.
 * @typedef {{kind: 'text', length: number, alphabet: string[], every: boolean}} Text */
/** @typedef {Images | Motion | Text | {kind: 'files'}} Source */
/** @typedef {{count: number, x: ArrayLike<number>, y: ArrayLike<number>}} Rows Examples [count, …] and their labels. */

/** Characters of LEAF's Shakespeare (arXiv 1812.01097) in their order, for models of text without names of their own. */
const LEAF = [...'\n !"&\'(),-.0123456789:;>?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz}'];
const COLORS = [1, 3], SENSORS = [3, 6];

/**
 * @param {Interface} interface
 * @returns {Source}
 */
export function sourceOf({ inputs, heads }) {
  const [input] = inputs, { label } = heads[0];
  if (inputs.length > 1 || heads.length > 1 || label.classes === null) return { kind: 'files' };
  const { shape, dtype, classes: tokens } = input, classes = label.class_names ?? numbersTo(label.classes);
  if (label.shape.length === 0 && dtype === 'uint8' && tokens === null && (shape.length === 2 || isColored(shape))) {
    const [channels, height, width] = shape.length === 2 ? [1, ...shape] : shape;
    return { kind: 'images', channels, height, width, classes };
  }
  if (label.shape.length === 0 && dtype === 'float32' && shape.length === 2) {
    const stepsFirst = SENSORS.includes(shape[1]), [steps, channels] = stepsFirst ? shape : [shape[1], shape[0]];
    if (SENSORS.includes(channels)) return { kind: 'motion', steps, channels, stepsFirst, classes };
  }
  const alphabet = classes.every((name) => [...name].length === 1) && label.class_names ? classes : LEAF;
  const isNext = label.shape.length === 0 || String(label.shape) === String(shape);
  if (tokens === alphabet.length && label.classes === tokens && shape.length === 1 && isNext) {
    return { kind: 'text', length: shape[0], alphabet, every: label.shape.length === 1 };
  }
  return { kind: 'files' };
}

/**
 * Rows as the arrays of a model with one input and one label.
 * @param {Interface} interface
 * @param {Rows} rows
 * @returns {Map<string, Tensor>}
 */
export function arraysOf({ inputs: [input], heads: [{ label }] }, { count, x, y }) {
  return new Map([
    [input.name, tensorOf(input, count, x)],
    [label.name, tensorOf(label, count, y)],
  ]);
}

/**
 * @param {ArraySpec} spec
 * @param {number} count
 * @param {ArrayLike<number>} values
 * @returns {Tensor}
 */
function tensorOf({ dtype, shape }, count, values) {
  const stored =
    dtype === 'int64' ? BigInt64Array.from(Array.from(values, BigInt)) : dtype === 'uint8' ? Uint8Array.from(values) : Float32Array.from(values);
  if (stored.length !== count * entriesOf(shape)) throw new RangeError(`${stored.length} values of ${count} rows`);
  return { dtype, shape: [count, ...shape], values: stored };
}

/** @param {number} count */
const numbersTo = (count) => Array.from({ length: count }, (_, number) => String(number));

/** @param {readonly number[]} shape */
const isColored = (shape) => shape.length === 3 && COLORS.includes(shape[0]);
