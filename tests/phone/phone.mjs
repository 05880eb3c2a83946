/**
 * An emulated phone, Chromium with the screen and touch of one, that does what it is told on the page.
 *
 * usage: node phone.mjs CHROMIUM PROFILE [OPTIONS] < ACTIONS    PROFILE is the folder of what the browser keeps, OPTIONS
 * are of Chromium; ACTIONS is JSON, a list of [action, argument]. Prints JSON: what was read, and every request that left a page.
 */

import { existsSync } from 'node:fs';
import { writeFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { text } from 'node:stream/consumers';
import { argv, stdin } from 'node:process';

import { audit } from './audit.mjs';

const { chromium, devices } = createRequire(new URL('../../device_runtime/web/package.json', import.meta.url))(
  'playwright-core',
);
const [executablePath, profile, ...more] = argv.slice(2), DEADLINE_MS = 120_000;
const ARGS = [
  ...['--no-sandbox', '--disable-gpu', '--disable-quic', '--disable-background-networking', '--disable-sync'],
  ...['--disable-component-update', '--no-first-run'],
  // A camera with a moving test picture, which may be used.
  ...['--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream'],
];

/** @type {{url: string, method: string, bytes: number}[]} */
const requests = [];
/** @type {string[]} */
const read = [];
let context = await start();
let page = context.pages()[0] ?? (await context.newPage());

async function start() {
  const { defaultBrowserType: _, ...phone } = devices['Pixel 7'];
  const options = { ...phone, executablePath, headless: true, args: [...ARGS, ...more] };
  const started = await chromium.launchPersistentContext(profile, options);
  started.setDefaultTimeout(DEADLINE_MS);
  started.on('dialog', (/** @type {any} */ dialog) => dialog.accept());
  started.on('request', (/** @type {any} */ request) => {
    const body = request.postDataBuffer();
    requests.push({ url: request.url(), method: request.method(), bytes: body?.length ?? 0 });
  });
  return started;
}

/**
 * @param {(route: any) => unknown} act What is done with requests whose address ends so, from the nth on.
 * @returns {(argument: any) => Promise<unknown>}
 */
function catching(act) {
  return ([end, method, nth]) =>
    context.route(`**/*${end}`, (/** @type {any} */ route) => {
      const isMeant = route.request().method() === method && --nth < 0;
      return isMeant ? act(route) : route.continue();
    });
}

/** @type {Record<string, (argument: any) => Promise<unknown>>} */
const ACTIONS = {
  open: (url) => page.goto(url),
  /** Wait until the page is in a state of `page.js`, or says what is wrong. */
  until: (state) => page.waitForSelector(`body[data-now=${state}], #trouble:not([hidden])`),
  untilStatus: (part) => page.waitForSelector(`#status:has-text("${part}")`),
  untilModel: (part) => page.waitForSelector(`#model:has-text("${part}")`),
  untilError: () => page.waitForSelector('#trouble:not([hidden])'),
  untilStep: (step) => page.waitForFunction((/** @type {number} */ n) => (document.querySelector('progress')?.value ?? 0) >= n, step),
  pick: (file) => page.setInputFiles('#file', file),
  upload: ([id, files]) => page.setInputFiles(`#${id}`, files),
  choose: (name) => page.getByRole('radio', { name, exact: true }).check(),
  type: ([id, content]) => page.fill(`#${id}`, content),
  select: ([id, value]) => page.selectOption(`#${id}`, value),
  untilText: ([id, part]) => page.waitForSelector(`#${id}:has-text("${part}")`),
  /** Movement for some seconds, by the events that a phone's sensors give, with their times but all at once. */
  move: (seconds) =>
    page.evaluate((/** @type {number} */ most) => {
      for (let begun = performance.now(), ms = 0; ms < 1000 * most; ms += 16) {
        const swing = Math.sin(ms / 80), rotationRate = { alpha: 20 * swing, beta: -10 * swing, gamma: 5 };
        const accelerationIncludingGravity = { x: swing, y: 2 * swing, z: 9.80665 };
        const event = new DeviceMotionEvent('devicemotion', { accelerationIncludingGravity, rotationRate, interval: 16 });
        dispatchEvent(Object.defineProperty(event, 'timeStamp', { value: begun + ms }));
      }
    }, seconds),
  tap: (id) => page.tap(`#${id}`),
  press: (name) => page.getByRole('button', { name, exact: true }).first().tap(),
  read: async (id) => read.push(id === 'address' ? page.url() : String(await page.textContent(`#${id}`))),
  /** What happens when another app comes to the front. */
  hide: () =>
    page.evaluate(() => {
      Object.defineProperty(document, 'visibilityState', { value: 'hidden', configurable: true });
      document.dispatchEvent(new Event('visibilitychange'));
    }),
  /** Whether the page's policy lets a request out. */
  reach: async (url) =>
    read.push(await page.evaluate((/** @type {string} */ to) => fetch(to, { mode: 'no-cors' }).then(() => 'out', () => 'kept in'), url)),
  ask: async (script) => read.push(String(await page.evaluate(script))),
  audit: async () => read.push(JSON.stringify(await audit(page))),
  /** Size of the screen, in pixels of CSS. */
  screen: ([width, height]) => page.setViewportSize({ width, height }),
  /** Preferences of the person: colorScheme, reducedMotion. */
  prefer: (media) => page.emulateMedia(media),
  /** Size of the person's font, in percent. */
  font: (percent) =>
    page.evaluate((/** @type {number} */ size) => {
      document.documentElement.style.fontSize = `${size}%`;
    }, percent),
  picture: (path) => page.screenshot({ path, fullPage: true }),
  /** What is on the screen now, and not the whole page. */
  photograph: (path) => page.screenshot({ path }),
  /** Scroll to an element. */
  show: (id) => page.evaluate((/** @type {string} */ name) => document.getElementById(name)?.scrollIntoView(), id),
  wait: (ms) => page.waitForTimeout(ms),
  /** Another tab, where the actions after it happen. */
  tab: async () => (page = await context.newPage()),
  /** Back to the nth tab. */
  turn: async (n) => {
    page = context.pages()[n];
    await page.evaluate(() => document.dispatchEvent(new Event('visibilitychange')));
  },
  /** The browser ends, with all its tabs, and is started again. */
  restart: async () => {
    await context.close();
    context = await start();
    page = context.pages()[0] ?? (await context.newPage());
  },
  /** Tell the test, and wait for what the test does, by files. */
  signal: (path) => writeFile(path, ''),
  untilFile: async (path) => {
    for (const until = Date.now() + DEADLINE_MS; !existsSync(path); ) {
      if (Date.now() > until) throw new Error(`no ${path}`);
      await page.waitForTimeout(50);
    }
  },
  /** Have requests whose address ends so reach nobody, from the nth on, or wait for good; and let them through again. */
  block: catching((route) => route.abort('internetdisconnected')),
  hold: catching(() => {}),
  unblock: () => context.unrouteAll(),
  /** Bytes that the page's origin may store. */
  quota: async (bytes) => {
    const session = await context.newCDPSession(page);
    await session.send('Storage.overrideQuotaForOrigin', { origin: new URL(page.url()).origin, quotaSize: bytes });
  },
  offline: (is) => context.setOffline(is),
  /** Before a page is opened: a browser that lacks something, as a script takes it away. */
  without: (script) => context.addInitScript(script),
};

try {
  for (const [action, argument] of JSON.parse(await text(stdin))) {
    await ACTIONS[action](argument).catch(async (error) => {
      console.error(`${action} ${argument}, on this page:\n${await page.innerText('body')}`);
      throw error;
    });
  }
  console.log(JSON.stringify({ read, requests }));
} finally {
  await context.close();
}
