/** The operator's page: shows the federation every two seconds, and pauses it, resumes it or closes its round. */

const EVERY_MS = 2000, KEY = 'fedpara-edge operator';

/**
 * @param {string} id
 * @returns {any}
 */
const element = (id) => document.getElementById(id);

const given = new URLSearchParams(location.hash.slice(1)).get('operator');
if (given) {
  sessionStorage.setItem(KEY, given);
  history.replaceState(null, '', location.pathname);
}
const headers = { Authorization: `Bearer ${sessionStorage.getItem(KEY) ?? ''}` };

/** @param {number} bytes */
const size = (bytes) => `${(bytes / 1e6).toFixed(2)} MB`;

/**
 * @param {string} id
 * @param {string} text
 */
function show(id, text) {
  element(id).textContent = text;
  element(id).hidden = text === '';
}

/**
 * Rows of a table; text alone, as names and sentences come from devices.
 * @param {string} id
 * @param {string[][]} rows
 */
function fill(id, rows) {
  element(id).replaceChildren(
    ...rows.map((cells) => {
      const row = document.createElement('tr');
      row.append(...cells.map((text) => Object.assign(document.createElement('td'), { textContent: text })));
      return row;
    }),
  );
}

/** @param {any} found */
function draw(found) {
  const { round, phase, updates, wanted, asked } = found;
  show('now', `Round ${round + 1} is ${phase}: ${updates} of ${wanted} updates, ${asked} devices asked.`);
  show('error', found.error ?? '');
  Object.assign(element('progress'), { value: Math.min(updates, wanted), max: wanted });
  const isPaused = phase === 'paused' || found.error !== null;
  element('pause').hidden = isPaused;
  element('resume').hidden = !isPaused;
  element('pause').disabled = phase !== 'open';
  element('close').disabled = !updates || (phase !== 'open' && phase !== 'paused');
  fill('rounds', found.rounds.map((/** @type {any} */ each) => [
    `${each.round + 1}`, `${each.updates}`, `${each.rejected}`, `${each.stragglers}`, `${each.examples}`,
    each.loss === null ? '' : each.loss.toFixed(4), size(each.received_bytes),
    `${((100 * each.received_bytes) / each.dense_bytes).toFixed(1)} %`, `${each.seconds.toFixed(0)} s`,
  ]));
  fill('devices', found.devices.map((/** @type {any} */ each) => [
    each.client,
    each.has_sent ? 'sent' : each.is_asked ? 'training' : each.is_here ? 'here' : 'away',
    each.round === null ? '' : `${each.round + 1}`,
    each.error ?? '',
  ]));
}

async function refresh() {
  try {
    const response = await fetch('operator/state', { headers, cache: 'no-store' });
    if (response.ok) draw(await response.json());
    else show('error', await response.text());
  } catch {
    show('error', 'No connection to the server; trying again.');
  }
}

for (const what of ['pause', 'resume', 'close']) {
  element(what).addEventListener('click', async () => {
    const response = await fetch(`operator/${what}`, { method: 'POST', headers }).catch(() => null);
    if (response && !response.ok) alert(await response.text());
    await refresh();
  });
}
await refresh();
setInterval(refresh, EVERY_MS);
