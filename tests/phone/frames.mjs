/**
 * Frames of bytes of many distributions, as Zstandard decodes them, under Node.
 *
 * usage: node frames.mjs    prints, as JSON, the number of frames, that of contents without one, and every wrong one
 */

import { huffmanFrame } from '../../device_runtime/web/codecs/huffman.js';
import { SFC64 } from '../../device_runtime/web/random.js';
import { loadTools } from './tools.mjs';

const { zstd } = await loadTools(), random = new SFC64(2);
const SIZES = [256, 257, 1023, 1024, 5000, 16383, 16384, 40_000, 65_536];
/** Symbols from a number in [0, 1), by the number of symbols.
 * @type {Record<string, (number: number, symbols: number) => number>} */
const SHAPES = {
  even: (number, symbols) => number * symbols,
  skewed: (number, symbols) => number ** 6 * symbols,
  geometric: (number, symbols) => Math.min(symbols - 1, -Math.log2(1 - number)),
  high: (number, symbols) => 255 - number ** 3 * symbols,
  bell: (number, symbols) => Math.min(Math.max(symbols / 2 + (Math.log(number + 1e-9) - Math.log(1 - number + 1e-9)) * symbols * 0.06, 0), symbols - 1),
};
const found = { frames: 0, none: 0, wrong: /** @type {string[]} */ ([]) };
for (const [name, shape] of Object.entries(SHAPES)) {
  for (const symbols of [1, 2, 3, 4, 15, 16, 100, 129, 200, 225, 256]) {
    for (const size of SIZES) {
      const bytes = Uint8Array.from({ length: size }, () => Math.floor(shape(random.float32(), symbols))), frame = huffmanFrame(bytes);
      if (!frame) found.none++;
      else if (zstd.decompress(frame).join() === bytes.join()) found.frames++;
      else found.wrong.push(`${name} ${symbols} ${size}`);
    }
  }
}
console.log(JSON.stringify(found));
