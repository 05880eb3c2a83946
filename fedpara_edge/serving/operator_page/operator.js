/** The operator's page: shows the federation as it changes, and pauses it, resumes it or closes its round. */

const WAIT_SECONDS = 25, AGAIN_MS = 2000, KEY = 'fedpara-edge operator';

/**
 * @typedef {{round: number, accuracy: number | null, loss: number | null, train_loss: number | null, updates: number,
 *   rejected: number, stragglers: number, examples: number | null, up_bytes: number | null, down_bytes: number | null,
 *   dense_bytes: number | null, seconds: number | null}} Round
 * @typedef {{client: string, is_here: boolean, has_sent: boolean, is_asked: boolean, round: number | null,
 *   error: string | null}} Device
 * @typedef {{model: string, round: number, rounds_wanted: number | null, phase: string, error: string | null,
 *   updates: number, wanted: number, fewest: number, asked: number, is_evaluated: boolean, is_evaluating: boolean,
 *   privacy: {spent: number, epsilon: number, delta: number} | null, total: Record<string, number>, rounds: Round[],
 *   devices: Device[]}} State
 */

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
let tag = '';

/** @param {number | null} bytes */
function size(bytes) {
  if (bytes === null) return '';
  for (const [unit, of] of /** @type {[string, number][]} */ ([['GB', 1e9], ['MB', 1e6], ['kB', 1e3]]))
    if (bytes >= of) return `${(bytes / of).toPrecision(3)} ${unit}`;
  return `${bytes} B`;
}

/** @param {number | null} share */
const percent = (share) => (share === null ? '' : `${(100 * share).toFixed(1)} %`.replace('-', '−'));

/** @param {number | null} value */
const decimal = (value) => (value === null ? '' : value.toFixed(4));

/**
 * @param {number | null} bytes
 * @param {number | null} dense
 */
const saved = (bytes, dense) => (bytes === null || !dense ? null : Math.max(0, 1 - bytes / dense));

/** @param {number} seconds */
const time = (seconds) => (seconds < 120 ? `${seconds.toFixed(0)} s` : `${(seconds / 60).toFixed(0)} min`);

/**
 * @param {string} id
 * @param {string} text
 */
function show(id, text) {
  if (element(id).textContent !== text) element(id).textContent = text;
  element(id).hidden = text === '';
}

/**
 * Rows of a table; text alone, as names and sentences come from devices.
 * @param {string} id
 * @param {string[][]} rows
 */
function fill(id, rows) {
  element(id).replaceChildren(
    ...rows.map(([head, ...cells]) => {
      const row = document.createElement('tr'), name = document.createElement('th');
      Object.assign(name, { scope: 'row', textContent: head });
      row.append(name, ...cells.map((text) => Object.assign(document.createElement('td'), { textContent: text })));
      return row;
    }),
  );
}

/** @param {State} found */
function draw(found) {
  const { round, rounds_wanted: rounds, phase, updates, wanted, fewest, asked, error } = found;
  const of = rounds === null ? '' : ` of ${rounds}`, isPaused = phase === 'paused' || error !== null;
  const state = phase === 'finished' ? `All ${rounds} rounds are done.` : `Round ${round + 1}${of} is ${phase}: ` +
    `${updates} of ${wanted} updates, ${asked} ${asked === 1 ? 'device' : 'devices'} asked.`;
  document.title = `${phase === 'finished' ? 'Finished' : `Round ${round + 1}`} · ${found.model}`;
  show('model', found.model);
  show('now', state);
  show('error', error ?? '');
  Object.assign(element('progress'), { value: Math.min(updates, wanted), max: wanted });
  const hadFocus = ['pause', 'resume'].includes(document.activeElement?.id ?? '');
  element('pause').hidden = isPaused;
  element('resume').hidden = !isPaused;
  if (hadFocus) element(isPaused ? 'resume' : 'pause').focus();
  element('pause').disabled = phase !== 'open';
  element('close').disabled = updates < fewest || (phase !== 'open' && phase !== 'paused');
  show('question', `Close round ${round + 1} with ${updates} of ${wanted} updates? What other devices have trained in ` +
    'it no longer counts.');
  element('rounds').closest('table').classList.toggle('unevaluated', !found.rounds.some((each) => each.loss !== null) && !found.is_evaluated);
  drawFigures(found);
  drawCurve(found);
  fill('rounds', found.rounds.map((each, place) => [
    `${each.round}`, place === 0 && found.is_evaluating ? '…' : percent(each.accuracy), decimal(each.loss),
    decimal(each.train_loss), `${each.updates}`, `${each.rejected}`, `${each.stragglers}`, `${each.examples ?? ''}`,
    size(each.up_bytes), size(each.down_bytes), percent(saved(each.up_bytes, each.dense_bytes)),
    each.seconds === null ? '' : time(each.seconds),
  ]));
  fill('devices', found.devices.map((each) => [
    each.client,
    each.has_sent ? 'sent' : !each.is_here ? 'away' : each.is_asked ? 'training' : 'waiting',
    each.round === null ? '–' : `${each.round + 1}`,
    each.error ?? '',
  ]));
}

/** @param {State} found */
function drawFigures({ rounds, devices, total, privacy, is_evaluated: isEvaluated }) {
  const best = rounds.find((each) => each.accuracy !== null), here = devices.filter((each) => each.is_here).length;
  /** @type {[string, string, string][]} */
  const figures = [
    ['Devices here', `${here}`, `of ${devices.length} that joined`],
    ['Sent by devices', size(total.up_bytes), beside(total.up_bytes, total.dense_up_bytes)],
    ['Sent to devices', size(total.down_bytes), beside(total.down_bytes, total.dense_down_bytes)],
  ];
  if (isEvaluated) figures.unshift(['Accuracy', best ? percent(best.accuracy) : '–', best ? `after round ${best.round}` : '']);
  if (privacy) figures.push(['Privacy', `ε ${privacy.spent.toPrecision(3)}`, `of ${privacy.epsilon} at δ ${privacy.delta}`]);
  element('figures').replaceChildren(
    ...figures.map(([name, value, remark]) => {
      const group = document.createElement('div'), said = document.createElement('dd');
      said.append(value, Object.assign(document.createElement('small'), { textContent: remark }));
      group.append(Object.assign(document.createElement('dt'), { textContent: name }), said);
      return group;
    }),
  );
}

/**
 * @param {number} bytes
 * @param {number} dense
 */
function beside(bytes, dense) {
  const share = saved(bytes, dense);
  if (share === null) return '';
  return share > 0 ? `${percent(share)} less than the dense model’s ${size(dense)}` : `the dense model takes ${size(dense)}`;
}

/** @param {State} found */
function drawCurve({ rounds }) {
  const name = rounds.some((each) => each.accuracy !== null) ? 'accuracy' : 'train_loss';
  const points = /** @type {[number, number][]} */ (
    rounds.map((each) => [each.round, each[name]]).filter(([, value]) => value !== null).reverse()
  );
  element('curve').hidden = points.length < 2;
  if (points.length < 2) return;
  const [first, last] = [points[0], points[points.length - 1]], values = points.map(([, value]) => value);
  const low = Math.min(...values), high = Math.max(...values), shown = name === 'accuracy' ? percent : decimal;
  const placed = points.map(([round, value]) =>
    `${((600 * (round - first[0])) / (last[0] - first[0])).toFixed(1)},${(high > low ? 150 - (140 * (value - low)) / (high - low) : 80).toFixed(1)}`);
  element('curve').querySelector('polyline').setAttribute('points', placed.join(' '));
  show('curve-title', `${name === 'accuracy' ? 'Accuracy' : 'Training loss'} of rounds ${first[0]} to ${last[0]}: ` +
    `${shown(first[1])} to ${shown(last[1])}, between ${shown(low)} and ${shown(high)}`);
}

/** Show what is there, once it is something else than what is shown; whether to ask again at once. */
async function refresh() {
  try {
    const asked = tag ? { 'If-None-Match': tag, Prefer: `wait=${WAIT_SECONDS}` } : {};
    const response = await fetch('operator/state', { headers: { ...headers, ...asked }, cache: 'no-store' });
    if (response.status === 304) return true;
    if (response.ok) {
      draw(await response.json());
      tag = response.headers.get('ETag') ?? '';
      return tag !== '';
    }
    tag = '';
    show('now', '');
    show('error', response.status !== 401 ? await response.text()
      : 'This page needs the operator’s link: on the server, type fedpara-edge invite STATE --operator, and open what it shows.');
  } catch {
    tag = '';
    show('error', 'No connection to the server; trying again.');
  }
  return false;
}

/** @param {string} what */
async function operate(what) {
  const response = await fetch(`operator/${what}`, { method: 'POST', headers }).catch(() => null);
  if (response && !response.ok) show('error', await response.text());
}

for (const what of ['pause', 'resume']) element(what).addEventListener('click', () => operate(what));
element('close').addEventListener('click', () => element('confirm').showModal());
element('no').addEventListener('click', () => element('confirm').close());
element('yes').addEventListener('click', () => {
  element('confirm').close();
  operate('close');
});

async function watch() {
  for (;;) if (!(await refresh())) await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
}
watch();
