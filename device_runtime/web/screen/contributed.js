/** What this phone has sent so far. */

import { element, make } from './elements.js';
import { currentLanguage, sizeOf, write } from './sentences.js';

/** @param {readonly import('../contributions.js').Contribution[]} contributions */
export function showContributions(contributions) {
  const bytes = contributions.reduce((sum, each) => sum + each.bytes, 0), count = contributions.length;
  write(element('sum'), count ? 'contributedSum' : 'contributedNothing', { count, size: () => sizeOf(bytes) });
  const lines = [...contributions].reverse().map(({ round, examples, bytes: each, at }) => {
    const line = make('li'), when = () => new Date(at).toLocaleString(currentLanguage(), { dateStyle: 'medium', timeStyle: 'short' });
    write(line, 'contribution', { round: round + 1, count: examples, size: () => sizeOf(each), when });
    return line;
  });
  element('contributions').replaceChildren(...lines);
}
