/** Error with a message of one line for the person at the device: what was expected, what was found, and the remedy. */
export class FedparaError extends Error {
  /** @param {string} message */
  constructor(message) {
    super(message.replace(/\s+/g, ' '));
    this.name = 'FedparaError';
  }
}
