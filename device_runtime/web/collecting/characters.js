/** Text as windows of characters, each with the characters that follow: as `plans/data/shakespeare.py` cuts its roles. */

/** @typedef {import('./source.js').Text} Text */

/**
 * All whole windows of a text, without overlap, and how many of its characters the alphabet lacks, which count as blanks.
 * @param {string} text
 * @param {Text} source
 * @returns {import('./source.js').Rows & {unknown: number}}
 */
export function windowsOf(text, { length, alphabet, every }) {
  const places = new Map(alphabet.map((character, place) => [character, place])), blank = places.get(' ') ?? 0;
  const characters = [...text.replace(/\r\n?/g, '\n')], numbers = characters.map((each) => places.get(each) ?? blank);
  const count = Math.max(Math.floor((numbers.length - 1) / length), 0), next = numbers.slice(1, count * length + 1);
  return {
    count,
    x: numbers.slice(0, count * length),
    y: every ? next : next.filter((_, i) => i % length === length - 1),
    unknown: characters.filter((each) => !places.has(each)).length,
  };
}

/**
 * Text of a window.
 * @param {ArrayLike<number | bigint>} numbers
 * @param {Text} source
 */
export const textOf = (numbers, { alphabet }) => Array.from(numbers, (number) => alphabet[Number(number)] ?? ' ').join('');
