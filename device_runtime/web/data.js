/** Examples on the phone: checked against the interface of the model, and given out batch by batch. */

import { FedparaError } from './errors.js';
import { readNpz } from './npz.js';
import { entriesOf } from './tensorfile.js';

/** @typedef {import('./bundle.js').ArraySpec} ArraySpec */
/** @typedef {import('./bundle.js').Interface} Interface */
/** @typedef {import('./bundle.js').Loss} Loss */
/** @typedef {import('./npz.js').NpyArray} NpyArray */
/** @typedef {import('./tensorfile.js').Tensor} Tensor */
/** @typedef {Map<string, Tensor>} Batch Inputs and labels [B, …] by name, in the dtypes of the model. */

const STORES = { uint8: Uint8Array, bool: Uint8Array, float32: Float32Array, int64: BigInt64Array };
const INTEGERS = /^u?int/;

export class Dataset {
  /**
   * @param {number} examples
   * @param {ReadonlyMap<string, Tensor>} arrays Inputs and labels [N, …] by name, in the dtypes of the model.
   */
  constructor(examples, arrays) {
    this.examples = examples;
    this.arrays = arrays;
  }

  /**
   * Copies of some rows.
   * @param {Uint32Array} rows
   * @returns {Batch}
   */
  rows(rows) {
    /** @type {Batch} */
    const batch = new Map();
    for (const [name, { dtype, shape, values }] of this.arrays) {
      const size = entriesOf(shape.slice(1)), copied = new STORES[/** @type {'uint8'} */ (dtype)](rows.length * size);
      rows.forEach((row, i) => {
        copied.set(/** @type {typeof copied} */ (values.subarray(row * size, (row + 1) * size)), i * size);
      });
      batch.set(name, { dtype, shape: [rows.length, ...shape.slice(1)], values: copied });
    }
    return batch;
  }
}

/**
 * Open an `.npz` file with the arrays of a model's inputs and labels.
 * @param {Uint8Array<ArrayBuffer>} file
 * @param {string} name Name of the file, for errors.
 * @param {Interface} interface Interface of the model.
 */
export async function openData(file, name, { inputs, heads }) {
  const labels = heads.map(({ label }) => label), specs = [...inputs, ...labels];
  const names = specs.map((spec) => spec.name);
  const found = await readNpz(file, name, [...names, ...labels.map((label) => `${label.name}_names`)]);
  const missing = names.find((each) => !found.has(each));
  if (missing !== undefined) {
    throw new FedparaError(
      `${name}: expected arrays named ${names.join(', ')}, found no '${missing}'; save them under these names`,
    );
  }
  /** @type {Map<string, Tensor>} */
  const arrays = new Map();
  for (const spec of specs) {
    const head = heads.find(({ label }) => label === spec), array = /** @type {NpyArray} */ (found.get(spec.name));
    const numbers = head ? numbered(name, array, found.get(`${spec.name}_names`), spec) : array;
    arrays.set(spec.name, fitted(name, numbers, spec, head?.loss));
  }
  const counts = specs.map((spec) => /** @type {Tensor} */ (arrays.get(spec.name)).shape[0]);
  const other = counts.findIndex((count) => count !== counts[0]);
  if (other > 0) {
    throw new FedparaError(
      `${name}: expected as many rows in '${names[0]}' as in '${names[other]}', found ${counts[0]} and ` +
        `${counts[other]}; save inputs and labels together`,
    );
  }
  if (!counts[0]) throw new FedparaError(`${name}: expected at least one row, found none; add examples`);
  return new Dataset(counts[0], arrays);
}

/**
 * Labels with the numbers that the bundle gives to their classes, where the file has names for them.
 * @param {string} file
 * @param {NpyArray} labels
 * @param {NpyArray | undefined} named Names of the classes, in the order of the labels' numbers.
 * @param {ArraySpec} spec
 * @returns {NpyArray}
 */
function numbered(file, labels, named, spec) {
  const known = spec.class_names, names = named?.dtype === 'text' ? named.texts : undefined;
  if (spec.classes === null) return labels;
  /** @type {string[]} */
  let classes;
  if (labels.dtype === 'text' && known) classes = labels.texts;
  else if (labels.dtype === 'text' || !INTEGERS.test(labels.dtype)) return labels;
  else if (names) {
    if (!known && names.length !== spec.classes) {
      throw new FedparaError(
        `${file}: expected the ${spec.classes} classes of the bundle, found ${names.join(', ')}; number the labels`,
      );
    }
    if (!known) return labels;
    classes = [...labels.values].map((label) => names[Number(label)] ?? String(label));
  } else if (known?.every((each) => /^-?\d+$/.test(each))) classes = [...labels.values].map(String);
  else return labels;
  const numbers = classes.map((each) => {
    const number = known.indexOf(each);
    if (number < 0) {
      throw new FedparaError(
        `${file}: class '${each}': expected one of ${known.join(', ')}, found another; rename it, or leave it out`,
      );
    }
    return BigInt(number);
  });
  return { dtype: 'int64', shape: labels.shape, values: BigInt64Array.from(numbers) };
}

/**
 * An array in the dtype of the model, after all its values were checked.
 * @param {string} file
 * @param {NpyArray} array
 * @param {ArraySpec} spec
 * @param {Loss | undefined} loss Loss, of a label.
 * @returns {Tensor}
 */
function fitted(file, array, spec, loss) {
  const place = `${file}: array '${spec.name}'`;
  if (array.shape.length === 0 || String(array.shape.slice(1)) !== String(spec.shape)) {
    throw new FedparaError(
      `${place}: expected shape [${['N', ...spec.shape].join(', ')}], found [${array.shape.join(', ')}]; ` +
        'bring the examples to that shape',
    );
  }
  const isClass = spec.classes !== null;
  if (array.dtype === 'text' || !(isClass ? INTEGERS.test(array.dtype) : array.dtype === spec.dtype)) {
    throw new FedparaError(
      `${place}: expected ${isClass ? 'integers' : spec.dtype}, found ${array.dtype}; save it as such numbers`,
    );
  }
  const { values, shape } = array, rowEntries = entriesOf(shape.slice(1));
  const ignored = loss?.options['ignore_index'];
  const [expected, isGood] = /** @type {[string, (value: number) => boolean]} */ (
    isClass
      ? [
          `integers in [0, ${spec.classes})${ignored === undefined ? '' : ` or ${ignored}`}`,
          (value) => (value >= 0 && value < Number(spec.classes)) || (ignored !== undefined && value === Number(ignored)),
        ]
      : loss?.name === 'bce' || loss?.options['kind'] === 'probabilities'
        ? ['numbers in [0, 1]', (value) => value >= 0 && value <= 1]
        : ['finite numbers', Number.isFinite]
  );
  for (let i = 0; i < values.length; i++) {
    if (!isGood(Number(values[i]))) {
      throw new FedparaError(
        `${place}, row ${Math.floor(i / rowEntries)}: expected ${expected}, found ${values[i]}; ` +
          'correct or remove this row',
      );
    }
  }
  if (array.dtype === spec.dtype) return { dtype: spec.dtype, shape, values };
  const whole = [...values].map(BigInt);
  return { dtype: spec.dtype, shape, values: BigInt64Array.from(whole) };
}
