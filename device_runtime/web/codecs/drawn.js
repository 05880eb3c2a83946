/** Codec `drawn` of initial weights: from a seed instead of stored (`fedpara_edge.formats.drawn`). */

import { FedparaError } from '../errors.js';
import { sizeOf } from '../layout.js';
import { randomBytes, seedOf } from '../splitmix.js';
import { float32 } from '../tensorfile.js';

/** @typedef {import('../layout.js').TensorSpec} TensorSpec */
/** @typedef {import('../tensorfile.js').TensorFile} TensorFile */

/** @param {Record<string, any>} header */
export const isDrawn = ({ codec }) => codec?.name === 'drawn' && codec?.version === 1;

/**
 * The file of the same weights that stores all that this one draws.
 * @param {TensorFile} file
 * @param {string} name Name of the file, for errors.
 * @param {readonly TensorSpec[]} tensors Tensors of the weights.
 * @returns {Promise<TensorFile>}
 */
export async function withDrawn({ header, tensors: arrays }, name, tensors) {
  const { codec, ...others } = header, { seed, widths } = codec, found = new Map(arrays);
  for (const tensor of tensors.filter(({ shape }) => shape.filter((size) => size > 1).length > 1)) {
    const width = Math.fround(widths?.[tensor.name]);
    if (!Number.isSafeInteger(seed) || !(width >= 0 && width < Infinity) || arrays.has(tensor.name)) {
      throw new FedparaError(
        `${name}: expected a seed and a width of the tensor '${tensor.name}', found ${seed} and ${width}; fetch it again`,
      );
    }
    const drawn = randomBytes(await seedOf(`fedpara-edge/drawn ${seed} ${tensor.name}`), 2 * sizeOf(tensor));
    const values = Float32Array.from(new Uint16Array(drawn.buffer, 0, sizeOf(tensor)), (x) => width * ((2 * x - 65535) / 65536));
    found.set(tensor.name, float32(tensor.shape, values));
  }
  return { header: others, tensors: found };
}
