/**
 * The examples that a phone has collected for models of one interface, in a folder of its own. Each picture, recording,
 * text or picked file is a safetensors file of format `fedpara-edge/examples` with the arrays of its rows, in the dtypes
 * of the model; its name has a number, by which they are ordered, and the start of its SHA-256, so that nothing is there
 * twice.
 */

import { Dataset } from '../data.js';
import { sha256 } from '../digest.js';
import { FedparaError } from '../errors.js';
import { bytesOf, entriesOf, readTensors, writeTensors } from '../tensorfile.js';
import { compareText, pythonJson, toUtf8 } from '../text.js';

/** @typedef {import('../bundle.js').Interface} Interface */
/** @typedef {import('../folder.js').Folder} Folder */
/** @typedef {import('../tensorfile.js').Tensor} Tensor */
/**
 * One picture, recording, text or file.
 * @typedef {object} Item
 * @property {string} id
 * @property {string} name Name of the file that it was; empty for what was made here.
 * @property {number} rows Number of examples.
 * @property {number[] | null} classes Class of each of them; null for labels that are no classes.
 * @property {Tensor} first First input of the first of them, a row.
 */

const FORMAT = 'fedpara-edge/examples', FILE = /^(\d{6})-([0-9a-f]{32})\.safetensors$/;

/**
 * Name of the folder for models of an interface.
 * @param {Interface} interface
 */
export async function folderName({ inputs, heads }) {
  const labels = heads.map(({ label }) => label);
  return (await sha256(toUtf8(pythonJson({ inputs, labels })))).slice(0, 16);
}

export class Collection {
  /**
   * @param {Folder} folder
   * @param {Interface} model
   */
  constructor(folder, model) {
    this._folder = folder;
    this._model = model;
  }

  /** All items, in the order in which they were added. */
  async items() {
    const found = [];
    for (const name of await this._files()) found.push(this._item(name, await this._read(name)));
    return found;
  }

  /**
   * Add examples; null if they are there already.
   * @param {string} name
   * @param {ReadonlyMap<string, Tensor>} arrays Arrays of all inputs and labels.
   */
  async add(name, arrays) {
    const content = writeTensors(arrays, { format: FORMAT, version: 1, name }), digest = (await sha256(content)).slice(0, 32);
    const files = await this._files();
    if (files.some((file) => FILE.exec(file)?.[2] === digest)) return null;
    const number = 1 + Number(FILE.exec(files[files.length - 1] ?? '')?.[1] ?? 0);
    const file = `${String(number).padStart(6, '0')}-${digest}.safetensors`;
    await this._folder.write(file, content);
    return this._item(file, { header: { name }, tensors: new Map(arrays) });
  }

  /** @param {string} id */
  async remove(id) {
    await this._folder.remove(id);
  }

  /** All examples for a training call, and a digest by which the call is known. */
  async open() {
    const files = await this._files();
    /** @type {Map<string, Tensor>[]} */
    const contents = [];
    if (!files.length) throw new FedparaError('your examples: expected at least one, found none; add some');
    for (const name of files) contents.push((await this._read(name)).tensors);
    const specs = [...this._model.inputs, ...this._model.heads.map(({ label }) => label)];
    const arrays = new Map(specs.map(({ name }) => [name, concatenated(contents.map((each) => /** @type {Tensor} */ (each.get(name))))]));
    const digest = await sha256(toUtf8(files.map((name) => FILE.exec(name)?.[2]).join('\n')));
    return { data: new Dataset(arrays.get(specs[0].name)?.shape[0] ?? 0, arrays), digest };
  }

  async _files() {
    return (await this._folder.list()).filter((name) => FILE.test(name)).sort(compareText);
  }

  /** @param {string} name */
  async _read(name) {
    const content = await this._folder.read(name);
    if (!content) throw new FedparaError(`${name}: expected the examples that were added, found none; load the page again`);
    return readTensors(content, name, FORMAT);
  }

  /**
   * @param {string} id
   * @param {import('../tensorfile.js').TensorFile} file
   * @returns {Item}
   */
  _item(id, { header, tensors }) {
    const { inputs: [input], heads: [{ label }] } = this._model;
    const x = /** @type {Tensor} */ (tensors.get(input.name)), y = /** @type {Tensor} */ (tensors.get(label.name));
    const classes = label.classes !== null && !label.shape.length ? Array.from(y.values, Number) : null;
    const first = { dtype: x.dtype, shape: x.shape.slice(1), values: x.values.slice(0, entriesOf(x.shape.slice(1))) };
    return { id, name: header['name'], rows: x.shape[0], classes, first };
  }
}

/**
 * Arrays one after the other.
 * @param {readonly Tensor[]} parts
 * @returns {Tensor}
 */
function concatenated(parts) {
  const [{ dtype, shape, values }] = parts, rows = parts.reduce((sum, part) => sum + part.shape[0], 0);
  const whole = [rows, ...shape.slice(1)];
  const Store = /** @type {new (entries: number) => typeof values} */ (values.constructor), all = new Store(entriesOf(whole));
  let place = 0;
  for (const part of parts) {
    bytesOf(all).set(bytesOf(part.values), place);
    place += part.values.byteLength;
  }
  return { dtype, shape: whole, values: all };
}
