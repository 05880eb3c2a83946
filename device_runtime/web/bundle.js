/** The bundle that a device trains from (`fedpara_edge.formats.bundle`), as far as a phone needs it. */

import { sha256 } from './digest.js';
import { FedparaError } from './errors.js';
import { Layout } from './layout.js';
import { readTensors } from './tensorfile.js';
import { canonicalJson, fromUtf8, parseTyped, toUtf8 } from './text.js';

/** @typedef {import('./text.js').Bytes} Bytes */
/** @typedef {import('./tensorfile.js').Dtype} Dtype */
/** @typedef {(name: string) => Promise<Bytes>} Fetch Function that gets a file of the bundle by its name. */
/** @typedef {{name: string, shape: number[], dtype: Dtype, classes: number | null, class_names?: string[]}} ArraySpec */
/** @typedef {{output: ArraySpec, label: ArraySpec, loss: Loss}} Head */
/** @typedef {{name: string, options: Record<string, string>}} Loss */
/** @typedef {{inputs: ArraySpec[], heads: Head[]}} Interface */

const STEP = 'train_step.onnx', PERSONAL = 'local.safetensors', MANIFEST = 'manifest.json';
const REMEDY = 'load the page again', SCHEMAS = [1, 2, 3, 4];

export class Bundle {
  /**
   * @param {any} manifest Content of `manifest.json`.
   * @param {Bytes} step The graph of the training step.
   * @param {import('./tensorfile.js').Floats} personal Initial personal tensors.
   */
  constructor(manifest, step, personal) {
    /** @type {string} */
    this.model = manifest.model;
    /** @type {string} */
    this.fingerprint = manifest.fingerprint;
    /** @type {Record<string, any>} */
    this.optimizer = manifest.optimizer;
    this.layout = new Layout(manifest.layout.tensors, manifest.layout.layers);
    const { inputs, heads } = interfaceOf(manifest);
    this.inputs = inputs;
    this.heads = heads;
    this.step = step;
    this.personal = personal;
  }
}

/**
 * Inputs and trained outputs of a model (`fedpara_edge.formats.interface`).
 * @param {any} data Object with the entries of an interface, and perhaps others.
 * @returns {Interface}
 */
export function interfaceOf(data) {
  const heads = data.heads ?? [data];
  return {
    inputs: data.inputs ?? [data.input],
    heads: heads.map((/** @type {any} */ head) => ({ ...head, loss: parseTyped(head.loss) })),
  };
}

/**
 * Get a bundle and verify what is used of it.
 * @param {Fetch} fetch
 */
export async function openBundle(fetch) {
  const manifest = await readManifest(await fetch(MANIFEST));
  const verified = async (/** @type {string} */ name) => {
    const content = await fetch(name), expected = String(manifest.files[name].sha256), found = await sha256(content);
    if (found !== expected) {
      throw new FedparaError(
        `${name}: expected the content that ${MANIFEST} lists (sha256 ${expected.slice(0, 12)}…), ` +
          `found ${found.slice(0, 12)}…; ${REMEDY}`,
      );
    }
    return content;
  };
  if (!manifest.files?.[STEP]) {
    throw new FedparaError(`bundle: expected ${STEP}, found none; export it again with --engines onnxruntime`);
  }
  /** @type {import('./tensorfile.js').Floats} */
  const personal = new Map();
  if (manifest.files[PERSONAL]) {
    const { tensors } = readTensors(await verified(PERSONAL), PERSONAL, 'fedpara-edge/local');
    for (const [name, { values }] of tensors) personal.set(name, /** @type {Float32Array<ArrayBuffer>} */ (values));
  }
  return new Bundle(manifest, await verified(STEP), personal);
}

/**
 * The manifest, which must have the fingerprint that it states.
 * @param {Bytes} content
 */
async function readManifest(content) {
  let manifest, canonical;
  try {
    const text = fromUtf8(content);
    manifest = JSON.parse(text);
    canonical = canonicalJson(text, ['model', 'engines', 'files', 'fingerprint']);
  } catch (error) {
    throw new FedparaError(`${MANIFEST}: expected JSON, found ${/** @type {Error} */ (error).message}; ${REMEDY}`);
  }
  if (!SCHEMAS.includes(manifest?.schema)) {
    throw new FedparaError(
      `${MANIFEST}: expected schema 1, 2, 3 or 4, found ${manifest?.schema}; open the page of the release that exported it`,
    );
  }
  const found = await sha256(toUtf8(canonical)), stated = String(manifest.fingerprint);
  if (found === stated) return manifest;
  throw new FedparaError(
    `${MANIFEST}: expected fingerprint ${found.slice(0, 12)}…, found ${stated.slice(0, 12)}…: it was changed; ${REMEDY}`,
  );
}
