/** The server state of a round, of which a device reads SCAFFOLD's control variate (`fedpara_edge.formats.serverstate`). */

import { FedparaError } from './errors.js';
import { readTensors } from './tensorfile.js';

/**
 * Control variate of the server for some weights, by name.
 * @param {import('./text.js').Bytes} file
 * @param {string} name Name of the file, for errors.
 * @param {import('./bundle.js').Bundle} bundle
 * @param {import('./weights.js').Weights} weights
 * @returns {import('./tensorfile.js').Floats}
 */
export function readControl(file, name, bundle, weights) {
  const { header, tensors } = readTensors(file, name, 'fedpara-edge/server-state');
  const expected = { fingerprint: bundle.fingerprint, round: weights.round, base: weights.base };
  for (const [field, value] of Object.entries(expected)) {
    if (header[field] !== value) {
      throw new FedparaError(
        `${name}: ${field}: expected ${String(value).slice(0, 12)} as the weights have it, found ` +
          `${String(header[field]).slice(0, 12)}; take the state and the weights of one round`,
      );
    }
  }
  const group = 'control/', named = [...tensors].filter(([tensor]) => tensor.startsWith(group));
  if (!named.length) {
    throw new FedparaError(
      `${name}: expected the server state of algorithm scaffold, found that of ${header['algorithm']?.name}; ` +
        "train with the server's algorithm",
    );
  }
  return new Map(
    named.map(([tensor, { values }]) => [tensor.slice(group.length), /** @type {Float32Array<ArrayBuffer>} */ (values)]),
  );
}
