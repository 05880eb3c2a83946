/** Pictures from the camera, the library, and folders by class. */

import { pixelsOf } from '../collecting/pixels.js';
import { chosenClass } from './classes.js';
import { element } from './elements.js';
import { write } from './sentences.js';

/** @typedef {import('../collecting/source.js').Images} Images */
/** @typedef {import('../collecting/source.js').Rows} Rows */
/** @typedef {import('./giving.js').Giving} Giving */

const IMAGE = /\.(png|jpe?g|bmp|gif|webp|avif|heic|heif|tiff?)$/i;
/** The camera, from when it is asked for until it is let go. @type {Promise<MediaStream> | null} */
let stream = null;

/**
 * @param {Images} images
 * @param {Giving} giving
 */
export function offerPictures(images, giving) {
  const view = element('view'), pictures = element('pictures'), folder = element('folder');
  view.style.aspectRatio = `${images.width} / ${images.height}`;
  element('by-folder').hidden = !('webkitdirectory' in folder);
  element('camera').addEventListener('click', () => (stream ? closeCamera() : openCamera(giving)));
  element('shutter').addEventListener('click', async () => giving.add(await exampleOf(view, images, chosenClass())));
  pictures.addEventListener('change', async () => {
    const label = chosenClass(), files = [...pictures.files];
    pictures.value = '';
    for (const file of files) await addFile(file, label, images, giving);
  });
  folder.addEventListener('change', async () => {
    const files = [...folder.files];
    folder.value = '';
    await addFolder(files, images, giving);
  });
}

/** @param {Giving} giving */
async function openCamera(giving) {
  const view = element('view'), own = (stream = cameraStream());
  try {
    const given = await own;
    if (stream !== own) return;
    view.srcObject = given;
    view.hidden = false;
    await view.play();
  } catch (error) {
    if (stream !== own) return;
    closeCamera();
    return giving.fail('noCamera', String(error));
  }
  if (stream !== own) return;
  element('shutter').hidden = false;
  write(element('camera'), 'closeCamera');
}

const cameraStream = async () => navigator.mediaDevices.getUserMedia({ video: { facingMode: 'environment' }, audio: false });

/** Let go of the camera. */
export function closeCamera() {
  if (!stream) return;
  stream.then((given) => given.getTracks().forEach((track) => track.stop()), () => {}); // none was given
  stream = null;
  element('view').hidden = element('shutter').hidden = true;
  write(element('camera'), 'openCamera');
}

/**
 * @param {File} file
 * @param {number} label
 * @param {Images} images
 * @param {Giving} giving
 */
async function addFile(file, label, images, giving) {
  let rows;
  try {
    rows = await exampleOf(file, images, label);
  } catch {
    return giving.fail('noPicture', file.name, { name: file.name });
  }
  await giving.add(rows);
}

/**
 * Add all pictures in folders whose names are those of classes.
 * @param {readonly File[]} files
 * @param {Images} images
 * @param {Giving} giving
 */
async function addFolder(files, images, giving) {
  const found = files.filter(({ name }) => IMAGE.test(name)).map((file) => ({ file, name: folderOf(file) }));
  const unknown = found.find(({ name }) => !images.classes.includes(name));
  if (!found.length) return giving.fail('emptyFolder', '');
  if (unknown) return giving.fail('wrongFolder', `expected one of ${images.classes.join(', ')}`, { name: unknown.name });
  for (const { file, name } of found) await addFile(file, images.classes.indexOf(name), images, giving);
}

/** @param {File} file */
const folderOf = (file) => file.webkitRelativePath.split('/').at(-2) ?? '';

/**
 * @param {File | HTMLVideoElement} picture
 * @param {Images} images
 * @param {number} label
 * @returns {Promise<Rows>}
 */
async function exampleOf(picture, images, label) {
  const bitmap = await createImageBitmap(picture, { colorSpaceConversion: 'none' }), { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext('2d', { willReadFrequently: true });
  if (!context) throw new Error('no canvas');
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return { count: 1, x: pixelsOf(context.getImageData(0, 0, width, height), images), y: [label] };
}
