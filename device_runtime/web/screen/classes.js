/** The classes to choose from, as radio buttons. */

import { element, make } from './elements.js';

/** @param {readonly string[]} classes */
export function offerClasses(classes) {
  const choices = classes.map((name, number) => {
    const input = make('input', { type: 'radio', name: 'class', value: String(number), checked: number === 0 });
    return make('label', {}, input, name);
  });
  element('choices').replaceChildren(...choices);
  element('classes').hidden = false;
}

/** Number of the class that is chosen. */
export const chosenClass = () => Number(/** @type {HTMLInputElement} */ (element('choices').querySelector(':checked')).value);
