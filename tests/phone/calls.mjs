/** The training calls of the test vectors, as the phone's modules take them. */

import { join } from 'node:path';

import { openBundle } from '../../device_runtime/web/bundle.js';
import { openData } from '../../device_runtime/web/data.js';
import { readControl } from '../../device_runtime/web/serverstate.js';
import { makeSettings } from '../../device_runtime/web/settings.js';
import { readWeights } from '../../device_runtime/web/weights.js';
import { read } from './tools.mjs';

/**
 * @param {string} folder Folder of the vectors.
 * @param {any} vector
 * @param {{zstd: import('../../device_runtime/web/codecs/parts.js').Zstd}} tools
 */
export async function openCall(folder, { bundle: path, weights: name, data, settings, control }, { zstd }) {
  const stored = (/** @type {string} */ file) => read(join(folder, file));
  const bundle = await openBundle((file) => stored(join(path, file)));
  const weights = await readWeights(await stored(name), name, bundle, zstd);
  return {
    bundle,
    weights,
    data: await openData(await stored(data), data, bundle),
    settings: makeSettings(settings),
    ...(control ? { control: readControl(await stored(control), control, bundle, weights) } : {}),
  };
}
