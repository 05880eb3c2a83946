/**
 * What the phone's modules make of pictures, movement and text, under Node.
 *
 * usage: node collected.mjs < CASES    CASES is JSON, {images, motion, text, sources}: lists of arguments. Prints the answers
 * as JSON, in the same shape
 */

import { text } from 'node:stream/consumers';
import { stdin } from 'node:process';

import { interfaceOf } from '../../device_runtime/web/bundle.js';
import * as characters from '../../device_runtime/web/collecting/characters.js';
import * as motion from '../../device_runtime/web/collecting/motion.js';
import { pixelsOf } from '../../device_runtime/web/collecting/pixels.js';
import { sourceOf } from '../../device_runtime/web/collecting/source.js';

/** @type {Record<string, any[]>} */
const cases = JSON.parse(await text(stdin));
const events = (/** @type {any[]} */ given) => given.map(([ms, acceleration, rotation]) => motion.readingOf(ms, acceleration, rotation));

console.log(
  JSON.stringify({
    images: cases['images'].map(({ picture, shape }) => [...pixelsOf(picture, shape)]),
    motion: cases['motion'].map(({ given, source, label }) => motion.windowsOf(events(given).filter((each) => each !== null), source, label)),
    text: cases['text'].map(({ said, source }) => characters.windowsOf(said, source)),
    sources: cases['sources'].map((manifest) => sourceOf(interfaceOf(manifest))),
  }),
);
