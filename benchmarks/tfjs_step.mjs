/**
 * The dense `mlp` and `cnn` of the zoo in TensorFlow.js, which train by SGD as our own step does; runs on the page.
 *
 * A step makes tensors of its batch, trains, and reads the loss. Images are [B, C, H, W] in the batch, as everywhere
 * here, and [B, H, W, C] in the model, which is what TensorFlow.js convolves.
 */

import '@tensorflow/tfjs-backend-cpu';
import { setWasmPaths } from '@tensorflow/tfjs-backend-wasm';
import * as tf from '@tensorflow/tfjs-core';
import '@tensorflow/tfjs-core/dist/register_all_gradients.js';

/** @typedef {(name: string) => tf.Tensor} Weights Weights by name. */
/** @typedef {(of: Weights, images: tf.Tensor4D) => tf.Tensor} Logits */
/** @typedef {import('../device_runtime/web/tensorfile.js').Tensor} Tensor */

const EPSILON = 1e-5, MOST_GROUPS = 32;
/** @type {Record<string, Logits>} */
const MODELS = { mlp, cnn };

/**
 * Step of a model, which gives its loss, on one thread of a backend.
 * @param {string} backend
 * @param {string} model
 * @param {Map<string, {shape: number[], values: Float32Array}>} tensors Initial values by name.
 * @param {{classes: number, learningRate: number, folder: string}} options Options, and the address of the folder with
 *   the files of WebAssembly.
 */
export async function openStep(backend, model, tensors, { classes, learningRate, folder }) {
  setWasmPaths(folder);
  tf.env().set('WASM_HAS_MULTITHREAD_SUPPORT', false);
  await tf.setBackend(backend);
  if (tf.getBackend() !== backend) throw new Error(`expected TensorFlow.js on ${backend}, found ${tf.getBackend()}`);
  const logits = MODELS[model], optimizer = tf.train.sgd(learningRate);
  const weights = new Map([...tensors].map(([name, { shape, values }]) => [name, tf.variable(tf.tensor(values, shape))]));
  /** @type {Weights} */
  const of = (name) => /** @type {tf.Variable} */ (weights.get(name));
  return (/** @type {Tensor} */ x, /** @type {Tensor} */ y) => {
    tf.setBackend(backend);
    return tf.tidy(() => {
      const values = /** @type {Uint8Array} */ (x.values), shape = /** @type {[number, number, number, number]} */ (x.shape);
      const images = tf.div(tf.cast(tf.tensor4d(values, shape, 'int32'), 'float32'), 255);
      const labels = tf.oneHot(Int32Array.from(y.values, Number), classes);
      const loss = () => tf.losses.softmaxCrossEntropy(labels, logits(of, /** @type {tf.Tensor4D} */ (images)));
      return /** @type {tf.Scalar} */ (optimizer.minimize(/** @type {() => tf.Scalar} */ (loss), true)).dataSync()[0];
    });
  };
}

/** @type {Logits} */
function mlp(of, images) {
  return linear(of, 'head', tf.relu(linear(of, 'hidden', tf.reshape(images, [images.shape[0], -1]))));
}

/** @type {Logits} */
function cnn(of, images) {
  let x = /** @type {tf.Tensor4D} */ (tf.transpose(images, [0, 2, 3, 1]));
  for (const block of [1, 2, 3, 4]) {
    const kernel = /** @type {tf.Tensor4D} */ (tf.transpose(of(`conv${block}.weight`), [2, 3, 1, 0]));
    const convolved = tf.add(tf.conv2d(x, kernel, 1, 'same'), of(`conv${block}.bias`));
    const normal = groupNorm(convolved, of(`norm${block}.weight`), of(`norm${block}.bias`));
    x = tf.maxPool(/** @type {tf.Tensor4D} */ (tf.relu(normal)), 2, 2, 'valid');
  }
  return linear(of, 'head', tf.reshape(tf.transpose(x, [0, 3, 1, 2]), [x.shape[0], -1]));
}

/**
 * @param {Weights} of
 * @param {string} name
 * @param {tf.Tensor} x
 */
function linear(of, name, x) {
  return tf.add(tf.matMul(x, of(`${name}.weight`), false, true), of(`${name}.bias`));
}

/**
 * @param {tf.Tensor} x Channels last [B, H, W, C].
 * @param {tf.Tensor} scale
 * @param {tf.Tensor} shift
 */
function groupNorm(x, scale, shift) {
  const [rows, height, width, channels] = x.shape;
  let groups = Math.min(MOST_GROUPS, channels / 2);
  while (channels % groups) groups--;
  const grouped = tf.reshape(x, [rows, height * width, groups, channels / groups]);
  const centered = tf.sub(grouped, tf.mean(grouped, [1, 3], true)), variance = tf.mean(tf.square(centered), [1, 3], true);
  const normal = tf.reshape(tf.div(centered, tf.sqrt(tf.add(variance, EPSILON))), x.shape);
  return tf.add(tf.mul(normal, scale), shift);
}
