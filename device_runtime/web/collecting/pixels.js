/**
 * Pictures as the input of a model, as `device_runtime.sources.images` makes them with Pillow: cut to the proportions of
 * the input around the middle, and resized with a triangle filter, first the rows and then the columns, in fixed point
 * with 22 bits, rounded to 8 bits between the two. Newer releases of Pillow take the columns first where that is faster,
 * and so a value may differ by one.
 */

/** @typedef {{data: ArrayLike<number>, width: number, height: number}} Picture Red, green, blue and alpha by pixel. */
/** @typedef {{start: number, weights: Int32Array}} Tap Pixels that make one, and their weights in fixed point. */

const BITS = 22, HALF = 1 << (BITS - 1);

/**
 * @param {Picture} picture
 * @param {import('./source.js').Images} images
 * @returns {Uint8Array} One example [channels, height, width].
 */
export function pixelsOf(picture, { channels, height, width }) {
  const { left, top, right, bottom } = cropOf(picture, width / height);
  const across = tapsOf(picture.width, left, right, width), down = tapsOf(picture.height, top, bottom, height);
  const example = new Uint8Array(channels * height * width);
  for (let channel = 0; channel < channels; channel++) {
    const plane = planeOf(picture, channels === 1 ? null : channel);
    const narrow = across ? resized(plane, picture.height, picture.width, across) : plane;
    const turned = transposed(narrow, picture.height, width);
    const small = down ? resized(turned, width, picture.height, down) : turned;
    example.set(transposed(small, width, height), channel * height * width);
  }
  return example;
}

/**
 * The largest part of a picture in the middle that has some proportions.
 * @param {{width: number, height: number}} picture
 * @param {number} ratio
 */
function cropOf({ width, height }, ratio) {
  const own = width / height;
  const inner = own > ratio ? ratio * height : width, outer = own < ratio ? width / ratio : height;
  const left = (width - inner) * 0.5, top = (height - outer) * 0.5;
  return { left, top, right: left + inner, bottom: top + outer };
}

/**
 * Taps of each pixel of a line; null for a line that stays as it is.
 * @param {number} size
 * @param {number} from
 * @param {number} to
 * @param {number} wanted
 * @returns {Tap[] | null}
 */
function tapsOf(size, from, to, wanted) {
  if (size === wanted && from === 0 && to === size) return null;
  const first = Math.fround(from), scale = Math.fround(Math.fround(to) - first) / wanted, reach = Math.max(scale, 1);
  return Array.from({ length: wanted }, (_, place) => {
    const center = first + (place + 0.5) * scale;
    const start = Math.max(Math.trunc(center - reach + 0.5), 0), stop = Math.min(Math.trunc(center + reach + 0.5), size);
    const shares = Array.from({ length: stop - start }, (_, i) => Math.max(0, 1 - Math.abs((i + start - center + 0.5) / reach)));
    const sum = shares.reduce((total, share) => total + share, 0);
    return { start, weights: Int32Array.from(shares, (share) => 0.5 + (share / sum) * (1 << BITS)) };
  });
}

/**
 * Lines made shorter or longer.
 * @param {Uint8Array} plane
 * @param {number} lines
 * @param {number} length
 * @param {readonly Tap[]} taps
 */
function resized(plane, lines, length, taps) {
  const found = new Uint8Array(lines * taps.length);
  for (let line = 0; line < lines; line++) {
    taps.forEach(({ start, weights }, place) => {
      let sum = HALF;
      for (let i = 0; i < weights.length; i++) sum += plane[line * length + start + i] * weights[i];
      found[line * taps.length + place] = Math.min(Math.max(sum >> BITS, 0), 255);
    });
  }
  return found;
}

/**
 * @param {Uint8Array} plane
 * @param {number} lines
 * @param {number} length
 */
function transposed(plane, lines, length) {
  const found = new Uint8Array(plane.length);
  for (let line = 0; line < lines; line++) {
    for (let i = 0; i < length; i++) found[i * lines + line] = plane[line * length + i];
  }
  return found;
}

/**
 * A color of a picture, or its brightness by ITU-R BT.601.
 * @param {Picture} picture
 * @param {number | null} color
 */
function planeOf({ data, width, height }, color) {
  const plane = new Uint8Array(width * height);
  for (let i = 0; i < plane.length; i++) {
    plane[i] = color === null ? (data[4 * i] * 19595 + data[4 * i + 1] * 38470 + data[4 * i + 2] * 7471 + 0x8000) >> 16 : data[4 * i + color];
  }
  return plane;
}
