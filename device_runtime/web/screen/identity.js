/** Name and key of this phone, as the lines by which it gets into a server's list of clients. */

import { element } from './elements.js';
import { write } from './sentences.js';

/** @typedef {{client: string, key: string}} Identity The key's public half. */

let isWanted = false;

/**
 * @param {Identity | null} identity Null where updates are not signed.
 * @param {boolean} wanted Whether the list still lacks it.
 */
export function showIdentity(identity, wanted) {
  element('identity').hidden = !identity;
  if (identity) element('lines').textContent = `[clients.${identity.client}]\nkey = "${identity.key}"`;
  if (wanted !== isWanted) element('identity').open = isWanted = wanted;
}

element('copy').addEventListener('click', async () => {
  await navigator.clipboard.writeText(`${element('lines').textContent}\n`).then(
    () => write(element('copied'), 'copied'),
    () => getSelection()?.selectAllChildren(element('lines')), // to be copied by hand
  );
});
