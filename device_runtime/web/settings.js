/** What a training call is told: the fields of `device_runtime.TrainConfig` and the codec, under the same names. */

import { FedparaError } from './errors.js';

/**
 * @typedef {object} Settings
 * @property {number} epochs
 * @property {number} batch_size
 * @property {number} seed
 * @property {boolean} drop_last
 * @property {number | null} clip_norm
 * @property {number} micro_batches
 * @property {string} algorithm
 * @property {number} lr
 * @property {'constant' | 'cosine' | 'linear' | 'steps'} schedule
 * @property {number} warmup_steps
 * @property {number | null} drop_every
 * @property {number | null} drop_factor
 * @property {number} lr_decay
 * @property {string} codec
 */

/** @type {Settings} */
const DEFAULTS = {
  epochs: 1,
  batch_size: 32,
  seed: 0,
  drop_last: false,
  clip_norm: null,
  micro_batches: 1,
  algorithm: 'fedavg',
  lr: 0.05,
  schedule: 'constant',
  warmup_steps: 0,
  drop_every: null,
  drop_factor: null,
  lr_decay: 1,
  codec: 'float32',
};

const WHOLE_FROM = { epochs: 1, batch_size: 1, seed: 0, micro_batches: 1, warmup_steps: 0, drop_every: 1 };
const POSITIVE = ['clip_norm', 'lr', 'drop_factor', 'lr_decay'];
const SHAPES = ['constant', 'cosine', 'linear', 'steps'];

/**
 * Settings with the defaults for what is not given.
 * @param {Partial<Settings>} given
 * @returns {Settings}
 */
export function makeSettings(given) {
  const unknown = Object.keys(given).find((name) => !(name in DEFAULTS));
  if (unknown !== undefined) {
    throw new FedparaError(
      `settings: expected ${Object.keys(DEFAULTS).join(', ')}, found ${unknown}; open the page of a newer release`,
    );
  }
  const settings = { ...DEFAULTS, ...given };
  /**
   * @param {string} name
   * @param {string} expected
   */
  const refuse = (name, expected) => {
    const found = JSON.stringify(/** @type {Record<string, unknown>} */ (settings)[name]);
    throw new FedparaError(`${name}: expected ${expected}, found ${found}; correct it where the task is written`);
  };
  for (const [name, least] of Object.entries(WHOLE_FROM)) {
    const value = settings[/** @type {keyof typeof WHOLE_FROM} */ (name)];
    if (value !== null && !(Number.isSafeInteger(value) && value >= least)) refuse(name, `an integer from ${least}`);
  }
  for (const name of POSITIVE) {
    const value = settings[/** @type {'lr'} */ (name)];
    if (value !== null && !(Number.isFinite(value) && value > 0)) refuse(name, 'a number above 0');
  }
  if (!SHAPES.includes(settings.schedule)) refuse('schedule', `one of ${SHAPES.join(', ')}`);
  return settings;
}

/**
 * Number of steps in a call.
 * @param {number} examples
 * @param {Settings} settings
 */
export function countSteps(examples, { batch_size, drop_last, epochs, warmup_steps }) {
  const batches = drop_last ? Math.floor(examples / batch_size) : Math.ceil(examples / batch_size);
  if (!batches) {
    throw new FedparaError(
      `drop_last: expected at least one whole batch of ${batch_size} rows, found ${examples} rows; add examples`,
    );
  }
  if (warmup_steps >= epochs * batches) {
    throw new FedparaError(
      `warmup_steps: expected fewer than the ${epochs * batches} steps of this call, found ${warmup_steps}; lower it`,
    );
  }
  return epochs * batches;
}
