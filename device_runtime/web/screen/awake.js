/** A screen that stays on while something is going on. */

/** Keep the screen on, where the browser can; returns a function that lets it go off again. */
export function stayAwake() {
  const lock = navigator.wakeLock?.request('screen').catch(() => null);
  return () => void lock?.then((held) => held?.release());
}
