/** The page's texts in the language of the person, on the elements that show them; another language changes them in place. */

import { LANGUAGES } from './texts.js';

/** @typedef {import('./texts.js').Key} Key */
/** @typedef {keyof typeof LANGUAGES} Language */
/** @typedef {Record<string, string | number | (() => string)>} Values Functions are asked again in another language. */

const STORED = 'language', TEXT = 'textContent';
/** What elements show, by the attribute in which they show it.
 * @type {Map<Element, Map<string, {key: Key, values: Values}>>} */
const shown = new Map();

const known = /** @type {Language[]} */ (Object.keys(LANGUAGES));
const preferred = [stored() ?? '', ...navigator.languages].map((each) => each.split('-')[0]);
/** @type {Language} */
let language = known.find((each) => each === preferred.find((one) => known.some((other) => other === one))) ?? known[0];

/** The language of the person. */
export const currentLanguage = () => language;

/**
 * A text with its values.
 * @param {Key} key
 * @param {Values} [values] A text that counts does so by `count`.
 */
export function say(key, values = {}) {
  const text = LANGUAGES[language].texts[key], count = Number(values['count']);
  const form = typeof text === 'string' ? text : text[new Intl.PluralRules(language).select(count) === 'one' ? 'one' : 'other'];
  return form.replace(/\{(\w+)\}/g, (_, name) => {
    const value = values[name];
    return typeof value === 'function' ? value() : typeof value === 'number' ? value.toLocaleString(language) : value;
  });
}

/**
 * Show a text on an element, or in an attribute of it.
 * @param {Element} element
 * @param {Key} key
 * @param {Values} [values]
 * @param {string} [attribute]
 */
export function write(element, key, values = {}, attribute = TEXT) {
  const texts = shown.get(element) ?? new Map();
  shown.set(element, texts.set(attribute, { key, values }));
  set(element, attribute, say(key, values));
}

/**
 * Show nothing on an element.
 * @param {Element} element
 */
export function wipe(element) {
  shown.delete(element);
  element.textContent = '';
}

/**
 * Show all texts in a language, those that the document's elements ask for as well, and keep the choice.
 * @param {Language} chosen
 */
export function speak(chosen) {
  language = chosen;
  document.documentElement.lang = language;
  try {
    localStorage.setItem(STORED, language);
  } catch {
    // The choice lasts as long as the page.
  }
  for (const element of document.querySelectorAll('[data-text]')) write(element, keyIn(element, 'data-text'));
  for (const element of document.querySelectorAll('[data-label]')) write(element, keyIn(element, 'data-label'), {}, 'aria-label');
  for (const [element, texts] of shown) {
    if (!element.isConnected) shown.delete(element);
    else for (const [attribute, { key, values }] of texts) set(element, attribute, say(key, values));
  }
  document.title = say('title');
}

/**
 * @param {Element} element
 * @param {string} attribute
 * @param {string} text
 */
function set(element, attribute, text) {
  if (attribute === TEXT) element.textContent = text;
  else element.setAttribute(attribute, text);
}

/**
 * @param {Element} element
 * @param {string} attribute
 */
const keyIn = (element, attribute) => /** @type {Key} */ (element.getAttribute(attribute));

function stored() {
  try {
    return localStorage.getItem(STORED);
  } catch {
    return null;
  }
}

/** @param {number} bytes */
export function sizeOf(bytes) {
  const [value, unit] = bytes < 1e6 ? [bytes / 1e3, 'kB'] : [bytes / 1e6, 'MB'];
  return `${value.toLocaleString(language, { maximumFractionDigits: 1, minimumFractionDigits: 1 })} ${unit}`;
}

/**
 * @param {number} value
 * @param {number} digits
 */
export const inDigits = (value, digits) => value.toLocaleString(language, { maximumSignificantDigits: digits });
