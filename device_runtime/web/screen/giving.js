/** The part of the page where a person gives examples: what the model can take, and what was collected of it. */

import { arraysOf, sourceOf } from '../collecting/source.js';
import { offerClasses } from './classes.js';
import { element } from './elements.js';
import { closeCamera, offerPictures } from './pictures.js';
import { endRecording, offerRecorder } from './recorder.js';
import { wipe, write } from './sentences.js';
import { Shelf } from './shelf.js';
import { offerTyping } from './typing.js';

/** @typedef {import('../bundle.js').Interface} Interface */
/** @typedef {import('../collecting/source.js').Rows} Rows */
/** @typedef {import('./sentences.js').Values} Values */
/** @typedef {import('./texts.js').Key} Key */
/**
 * What the sources of examples may do.
 * @typedef {object} Giving
 * @property {(rows: Rows) => Promise<void>} add
 * @property {(key: Key | null, values?: Values) => void} tell
 * @property {(key: Key, detail: string, values?: Values) => void} fail
 */

/**
 * @param {(request: import('../worker.js').Request) => void} ask Function that asks the worker.
 * @param {Giving['fail']} fail
 */
export function openGiving(ask, fail) {
  const shelf = new Shelf((id) => ask({ kind: 'remove', id })), file = element('file');
  /** @type {Interface | null} */
  let model = null;
  const tell = (/** @type {Key | null} */ key, /** @type {Values} */ values = {}) =>
    key ? write(element('told'), key, values) : wipe(element('told'));
  file.addEventListener('change', () => {
    for (const each of [...file.files]) ask({ kind: 'import', file: each });
    file.value = '';
  });
  return {
    shelf,
    tell,
    /** Stop what is going on; what was recorded is given first. */
    async stop() {
      closeCamera();
      await endRecording();
    },
    /**
     * Offer what a model can take, once.
     * @param {Interface} given
     */
    offer(given) {
      if (model) return;
      const source = sourceOf((model = given));
      /** @type {Giving} */
      const giving = { tell, fail, add: async (rows) => ask({ kind: 'add', arrays: arraysOf(given, rows) }) };
      shelf.of(source);
      write(element('how'), source.kind);
      element('giving').hidden = element('working').hidden = false;
      element('from-file').open = source.kind === 'files';
      if (source.kind === 'files') return;
      element(source.kind).hidden = false;
      if ('classes' in source) {
        offerClasses(source.classes);
        write(element('question'), source.kind === 'images' ? 'classOfImages' : 'classOfMotion');
      }
      if (source.kind === 'images') offerPictures(source, giving);
      else if (source.kind === 'motion') offerRecorder(source, giving);
      else offerTyping(source, giving);
    },
  };
}
