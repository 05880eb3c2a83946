/** Text that is typed, for models of characters. */

import { windowsOf } from '../collecting/characters.js';
import { element } from './elements.js';
import { write } from './sentences.js';

/**
 * @param {import('../collecting/source.js').Text} text
 * @param {import('./giving.js').Giving} giving
 */
export function offerTyping(text, giving) {
  const typed = element('typed'), button = element('add-text');
  const look = () => {
    const { count } = windowsOf(typed.value, text), left = text.length + 1 - [...typed.value].length;
    write(element('enough'), count ? 'charactersEnough' : 'charactersNeeded', { count: count || left });
    button.disabled = !count;
  };
  typed.addEventListener('input', look);
  button.addEventListener('click', async () => {
    const { unknown, ...rows } = windowsOf(typed.value, text);
    typed.value = '';
    look();
    if (unknown) write(element('enough'), 'charactersUnknown', { count: unknown });
    await giving.add(rows);
  });
  look();
}
