/** A look at what was collected, with counts by class, and deletion. */

import { textOf } from '../collecting/characters.js';
import { element, make } from './elements.js';
import { say, wipe, write } from './sentences.js';

/** @typedef {import('../collecting/collection.js').Item} Item */
/** @typedef {import('../collecting/source.js').Source} Source */
/** @typedef {import('../tensorfile.js').Tensor} Tensor */

const MOST_SHOWN = 24, SVG = 'http://www.w3.org/2000/svg';

export class Shelf {
  /** @param {(id: string) => void} remove Function that deletes an item. */
  constructor(remove) {
    this._remove = remove;
    /** @type {Item[]} */
    this._items = [];
    /** @type {Source} */
    this._source = { kind: 'files' };
    this._most = MOST_SHOWN;
    element('all').addEventListener('click', () => {
      this._most = Infinity;
      this._draw();
    });
  }

  /** Number of examples on it. */
  get examples() {
    return this._items.reduce((sum, { rows }) => sum + rows, 0);
  }

  /** @param {Source} source */
  of(source) {
    this._source = source;
    this._draw();
  }

  /** @param {readonly Item[]} items */
  fill(items) {
    this._items = [...items];
    this._draw();
  }

  /** @param {Item} item */
  add(item) {
    this._items.push(item);
    this._draw();
  }

  /**
   * @param {string} id
   * @returns {Item | undefined}
   */
  take(id) {
    const taken = this._items.find((item) => item.id === id);
    this._items = this._items.filter((item) => item !== taken);
    this._draw();
    return taken;
  }

  /**
   * What an item is, in a few words.
   * @param {Item} item
   */
  nameOf({ name, first, classes }) {
    const source = this._source;
    if (name || source.kind === 'files') return name;
    if (source.kind === 'text') return `“${textOf(first.values, source).slice(0, 24).trim()}…”`;
    return say(source.kind === 'images' ? 'pictureOf' : 'recordingOf', { what: source.classes[classes?.[0] ?? 0] });
  }

  _draw() {
    const examples = this.examples, counts = element('counts'), shown = this._items.slice(-this._most).reverse();
    write(element('count'), examples ? 'examplesHere' : 'noExamples', { count: examples });
    counts.replaceChildren(...this._counts().map(([name, count]) => make('li', {}, `${name}: ${count}`)));
    counts.hidden = !counts.children.length;
    element('shelf').className = this._source.kind === 'text' ? 'texts' : '';
    element('shelf').replaceChildren(...shown.map((item) => this._card(item)));
    const all = element('all');
    all.hidden = shown.length === this._items.length;
    if (!all.hidden) write(all, 'showAll', { count: this._items.length });
    else wipe(all);
  }

  /** @returns {[string, number][]} */
  _counts() {
    const names = 'classes' in this._source ? this._source.classes : [];
    const found = names.map((name) => /** @type {[string, number]} */ ([name, 0]));
    for (const { classes } of this._items) for (const each of classes ?? []) if (found[each]) found[each][1]++;
    return found.filter(([, count]) => count);
  }

  /** @param {Item} item */
  _card(item) {
    const what = () => this.nameOf(item), button = make('button', { className: 'quiet' }, '×');
    button.addEventListener('click', () => this._remove(item.id));
    write(button, 'removeItem', { what }, 'aria-label');
    const label = make('span', {}, this._caption(item));
    return make('li', {}, ...this._picture(item), label, button);
  }

  /** @param {Item} item */
  _caption({ name, rows, classes }) {
    const only = classes?.every((each) => each === classes[0]) && 'classes' in this._source ? this._source.classes[classes[0]] : '';
    return [name || only, rows > 1 ? `× ${rows}` : ''].filter(Boolean).join(' ');
  }

  /**
   * @param {Item} item
   * @returns {Element[]}
   */
  _picture({ first }) {
    const source = this._source;
    if (source.kind === 'images') return [thumbnail(first, source)];
    if (source.kind === 'motion') return [traces(first, source)];
    if (source.kind === 'text') return [make('q', {}, textOf(first.values, source))];
    return [];
  }
}

/**
 * The picture as the model sees it.
 * @param {Tensor} first
 * @param {import('../collecting/source.js').Images} images
 */
function thumbnail({ values }, { channels, height, width }) {
  const canvas = make('canvas', { width, height }), context = canvas.getContext('2d'), plane = height * width;
  canvas.setAttribute('aria-hidden', 'true');
  const picture = new ImageData(width, height);
  for (let i = 0; i < plane; i++) {
    for (let color = 0; color < 3; color++) picture.data[4 * i + color] = Number(values[Math.min(color, channels - 1) * plane + i]);
    picture.data[4 * i + 3] = 255;
  }
  context?.putImageData(picture, 0, 0);
  return canvas;
}

/**
 * The accelerations of a window, as lines.
 * @param {Tensor} first
 * @param {import('../collecting/source.js').Motion} motion
 */
function traces({ values }, { steps, channels, stepsFirst }) {
  const svg = document.createElementNS(SVG, 'svg'), at = (/** @type {number} */ step, /** @type {number} */ axis) =>
    Number(values[stepsFirst ? step * channels + axis : axis * steps + step]);
  svg.setAttribute('viewBox', '0 -2 4 4');
  svg.setAttribute('preserveAspectRatio', 'none');
  svg.setAttribute('class', 'trace');
  svg.setAttribute('aria-hidden', 'true');
  for (let axis = 0; axis < 3; axis++) {
    const path = document.createElementNS(SVG, 'path');
    const points = Array.from({ length: steps }, (_, step) => `${(4 * step) / (steps - 1 || 1)} ${Math.max(-2, Math.min(2, -at(step, axis)))}`);
    path.setAttribute('d', `M${points.join('L')}`);
    svg.append(path);
  }
  return svg;
}
