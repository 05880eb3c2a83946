/** The loss so far, as a line. */

import { element } from './elements.js';
import { inDigits, write } from './sentences.js';

const MOST_POINTS = 200, DIGITS = 3;

/** @param {readonly number[]} losses */
export function drawCurve(losses) {
  const every = Math.ceil(losses.length / MOST_POINTS), shown = losses.filter((_, i) => i % every === 0);
  const top = Math.max(...shown), bottom = Math.min(...shown), range = top - bottom || 1;
  const points = shown.map((loss, i) => `${(100 * i) / Math.max(shown.length - 1, 1)},${38 - (36 * (loss - bottom)) / range}`);
  element('curve').setAttribute('points', points.join(' '));
  const [first, last] = [losses[0], losses[losses.length - 1]].map((loss) => () => inDigits(loss, DIGITS));
  write(element('graph'), 'curve', { first, last }, 'aria-label');
}
