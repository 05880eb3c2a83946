/** Learning-rate schedules: pure functions of the position within a call and of the round. */

/** @typedef {import('./settings.js').Settings} Settings */

/**
 * The learning rate of one step (`device_runtime.schedule.learning_rate_at`).
 * @param {Settings} settings
 * @param {{step: number, steps: number, round: number}} position
 */
export function learningRateAt(settings, { step, steps, round }) {
  const peak = settings.lr * settings.lr_decay ** round, warmup = settings.warmup_steps;
  if (step < warmup) return (peak * (step + 1)) / warmup;
  const position = (step - warmup) / (steps - warmup);
  switch (settings.schedule) {
    case 'constant':
      return peak;
    case 'cosine':
      return (peak * (1 + Math.cos(Math.PI * position))) / 2;
    case 'linear':
      return peak * (1 - position);
    case 'steps': {
      const epoch = Math.floor((step * settings.epochs) / steps);
      return peak * (settings.drop_factor ?? 0.1) ** Math.floor(epoch / (settings.drop_every ?? 1));
    }
  }
}

/**
 * Sum Σ_k η_k of the learning rates of all steps of a call, rounded once, as `math.fsum` does.
 * @param {Settings} settings
 * @param {{steps: number, round: number}} call
 */
export function sumLearningRates(settings, { steps, round }) {
  return exactSum(Array.from({ length: steps }, (_, step) => learningRateAt(settings, { step, steps, round })));
}

/**
 * Sum of positive numbers, rounded once: by partial sums that together are exact (Shewchuk 1997).
 * @param {readonly number[]} values
 */
function exactSum(values) {
  /** @type {number[]} */
  let partials = [];
  for (let value of values) {
    const kept = [];
    for (let partial of partials) {
      if (Math.abs(value) < Math.abs(partial)) [value, partial] = [partial, value];
      const sum = value + partial, error = partial - (sum - value);
      if (error) kept.push(error);
      value = sum;
    }
    partials = [...kept, value];
  }
  let sum = 0, error = 0;
  while (partials.length && !error) {
    const before = sum, partial = /** @type {number} */ (partials.pop());
    sum = before + partial;
    error = partial - (sum - before);
  }
  // Half way between two numbers, what is left decides.
  const next = partials.at(-1);
  if (next !== undefined && Math.sign(next) === Math.sign(error)) {
    const doubled = 2 * error, rounded = sum + doubled;
    if (doubled === rounded - sum) sum = rounded;
  }
  return sum;
}
