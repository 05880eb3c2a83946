/** Text and bytes as Python's library writes them: sorted by code points, JSON as `json.dumps` has it. */

/** @typedef {Uint8Array<ArrayBuffer>} Bytes */

const ENCODER = new TextEncoder();
const DECODER = new TextDecoder('utf-8', { fatal: true });

/** @param {string} text */
export const toUtf8 = (text) => ENCODER.encode(text);

/** @param {Uint8Array} bytes */
export const fromUtf8 = (bytes) => DECODER.decode(bytes);

/** @param {ArrayBuffer | Uint8Array<ArrayBuffer>} bytes */
export function toHex(bytes) {
  return [...new Uint8Array(bytes)].map((byte) => byte.toString(16).padStart(2, '0')).join('');
}

/**
 * Order of two texts by their code points, in which Python sorts; JavaScript's own is by UTF-16 units.
 * @param {string} one
 * @param {string} other
 */
export function compareText(one, other) {
  const left = [...one], right = [...other];
  for (let i = 0; i < Math.min(left.length, right.length); i++) {
    const difference = /** @type {number} */ (left[i].codePointAt(0)) - /** @type {number} */ (right[i].codePointAt(0));
    if (difference) return difference;
  }
  return left.length - right.length;
}

/** Number that Python has as a float, which is written with a point where it is whole. */
export class Float {
  /** @param {number} value */
  constructor(value) {
    this.value = value;
  }
}

/**
 * JSON of a value, as `json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)` has it.
 * @param {unknown} value Whole numbers are integers, unless they come as `Float`.
 * @returns {string}
 */
export function pythonJson(value) {
  if (value instanceof Float) return floatText(value.value);
  if (typeof value === 'number') return Number.isInteger(value) ? String(BigInt(value)) : floatText(value);
  if (typeof value === 'string') return quoted(value);
  if (Array.isArray(value)) return `[${value.map(pythonJson).join(',')}]`;
  if (value !== null && typeof value === 'object') {
    const entries = Object.entries(value).sort(([one], [other]) => compareText(one, other));
    return `{${entries.map(([key, each]) => `${quoted(key)}:${pythonJson(each)}`).join(',')}}`;
  }
  if (value === null || typeof value === 'boolean') return String(value);
  throw new TypeError(`no JSON for ${typeof value}`);
}

/** A string, or a number outside of strings. */
const TOKEN = /"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?/g;

/**
 * JSON text as `pythonJson` has it, with every number as it stands there, and without some keys of the outermost object.
 * @param {string} text JSON that Python wrote.
 * @param {readonly string[]} without
 */
export function canonicalJson(text, without) {
  const value = JSON.parse(text.replace(TOKEN, (token) => (token.startsWith('"') ? token : `"\\u0000${token}"`)));
  for (const key of without) delete value[key];
  return pythonJson(value).replace(/"\\u0000([^"]*)"/g, '$1');
}

/** @param {string} text */
function quoted(text) {
  const escaped = (/** @type {string} */ unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, '0')}`;
  return JSON.stringify(text).replace(/[\u007f-\uffff]/g, escaped);
}

/** @param {number} value */
function floatText(value) {
  if (!Number.isFinite(value)) throw new TypeError(`no JSON for ${value}`);
  if (value === 0) return Object.is(value, -0) ? '-0.0' : '0.0';
  const [digits, power] = value.toExponential().split('e');
  const exponent = Number(power);
  if (exponent < -4 || exponent >= 16) {
    return `${digits}e${exponent < 0 ? '-' : '+'}${String(Math.abs(exponent)).padStart(2, '0')}`;
  }
  const fixed = exponent < 0 ? value.toFixed(digits.replace(/^-?\d\.?/, '').length - exponent) : String(value);
  return fixed.includes('.') ? fixed : `${fixed}.0`;
}

/**
 * Option of a codec or an algorithm as it is typed, such as `uniform:step=2,by=tensor`.
 * @param {string} text
 * @returns {{name: string, options: Record<string, string>}}
 */
export function parseTyped(text) {
  const colon = text.indexOf(':');
  const name = colon < 0 ? text : text.slice(0, colon);
  /** @type {[string, string][]} */
  const options = [];
  for (const part of colon < 0 ? [] : text.slice(colon + 1).split(',')) {
    const equals = part.indexOf('=');
    // A part without a value goes on with the list in the part before it.
    if (equals < 0 && options.length) options[options.length - 1][1] += `,${part}`;
    else options.push([part.slice(0, Math.max(equals, 0)), part.slice(equals + 1)]);
  }
  return { name, options: Object.fromEntries(options) };
}
