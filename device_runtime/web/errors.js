/**
 * Error with a message of one line, as every part of the library has it: what was expected, what was found, and the
 * remedy. Where a person at the device can do something about it, it has the key of a sentence in `screen/texts.js` too.
 */
export class FedparaError extends Error {
  /**
   * @param {string} message
   * @param {import('./screen/texts.js').Key | null} [sentence]
   */
  constructor(message, sentence = null) {
    super(message.replace(/\s+/g, ' '));
    this.name = 'FedparaError';
    this.sentence = sentence;
  }
}

const MEMORY = /alloc|out of memory|memory access|invalid (typed )?array length/i;

/**
 * An error of any kind as one for the person at the device.
 * @param {unknown} error
 */
export function explained(error) {
  if (error instanceof FedparaError) return error;
  const found = error instanceof Error ? `${error.name}: ${error.message}` : String(error);
  if (error instanceof DOMException && error.name === 'QuotaExceededError') {
    return new FedparaError(`this page: expected room to keep things, found ${found}; free some`, 'storageFull');
  }
  if (isAboutMemory(found)) return new FedparaError(`this page: expected enough memory, found ${found}; close other pages`, 'memory');
  return new FedparaError(`this page: ${found}; load it again`);
}

/**
 * Whether an error of the engine or the browser says that memory ran out.
 * @param {string} found
 */
export const isAboutMemory = (found) => MEMORY.test(found);
