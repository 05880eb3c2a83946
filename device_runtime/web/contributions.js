/** What this phone has sent, `contributions.json`: a list of {round, examples, bytes, at}, the last ones last. */

import { fromUtf8, toUtf8 } from './text.js';

/** @typedef {import('./folder.js').Folder} Folder */
/** An update that the server took, at a time in milliseconds since 1970.
 * @typedef {{round: number, examples: number, bytes: number, at: number}} Contribution */

const FILE = 'contributions.json', MOST = 1000;

/**
 * @param {Folder} folder
 * @returns {Promise<Contribution[]>}
 */
export async function readContributions(folder) {
  const found = await folder.read(FILE);
  return found ? JSON.parse(fromUtf8(found)) : [];
}

/**
 * Add one, unless it is there: an update of a round that is sent twice counts once.
 * @param {Folder} folder
 * @param {Contribution} contribution
 */
export async function addContribution(folder, contribution) {
  const others = (await readContributions(folder)).filter(({ round }) => round !== contribution.round);
  await folder.write(FILE, toUtf8(JSON.stringify([...others, contribution].slice(-MOST))));
}
