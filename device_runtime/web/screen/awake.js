/** A screen that stays on while something is going on. */

/** Keep the screen on, where the browser can; returns a function that lets it go off again. */
export function stayAwake() {
  /** @type {Promise<WakeLockSentinel | null> | undefined} */
  let lock;
  const hold = () => {
    if (document.visibilityState === 'visible') lock = navigator.wakeLock?.request('screen').catch(() => null);
  };
  hold();
  document.addEventListener('visibilitychange', hold); // a page that is hidden loses it
  return () => {
    document.removeEventListener('visibilitychange', hold);
    void lock?.then((held) => held?.release());
  };
}
