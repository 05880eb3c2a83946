/** Groups of tensors that a device keeps, as they lie in the files of its state: `<moment>/<group>/<name>`. */

import { float32 } from './tensorfile.js';

/** @typedef {import('./layout.js').Layout} Layout */
/** @typedef {import('./tensorfile.js').Tensors} Tensors */
/** @typedef {import('./training.js').Groups} Groups */

/**
 * Groups of a moment, `before` or `after`.
 * @param {Tensors} tensors
 * @param {string} moment
 * @returns {Groups}
 */
export function groupsIn(tensors, moment) {
  /** @type {Groups} */
  const groups = new Map();
  for (const [path, { values }] of tensors) {
    const [first, group] = path.split('/', 2), name = path.slice(first.length + group.length + 2);
    if (first !== moment) continue;
    if (!groups.has(group)) groups.set(group, new Map());
    groups.get(group)?.set(name, /** @type {Float32Array<ArrayBuffer>} */ (values));
  }
  return groups;
}

/**
 * Inverse of `groupsIn`.
 * @param {Groups} groups
 * @param {string} moment
 * @param {Layout} layout Layout with the shapes of all tensors.
 * @returns {Tensors}
 */
export function tensorsOf(groups, moment, layout) {
  const shapes = new Map([...layout.shared, ...layout.personal].map(({ name, shape }) => [name, shape]));
  const flat = [...groups].flatMap(([group, tensors]) =>
    [...tensors].map(([name, values]) => /** @type {const} */ ([`${moment}/${group}/${name}`, float32(shapes.get(name) ?? [], values)])),
  );
  return new Map(flat);
}
