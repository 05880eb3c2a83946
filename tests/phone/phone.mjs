/**
 * An emulated phone, Chromium with the screen and touch of one, that does what it is told on the page.
 *
 * usage: node phone.mjs CHROMIUM PROFILE < ACTIONS    PROFILE is the folder of what the browser keeps; ACTIONS is JSON, a
 * list of [action, argument]. Prints JSON: what was read, and every request that left a page.
 */

import { createRequire } from 'node:module';
import { text } from 'node:stream/consumers';
import { argv, stdin } from 'node:process';

const { chromium, devices } = createRequire(new URL('../../device_runtime/web/package.json', import.meta.url))(
  'playwright-core',
);
const [executablePath, profile] = argv.slice(2), DEADLINE_MS = 120_000;
const ARGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--disable-background-networking', '--disable-sync'];

/** @type {{url: string, method: string, bytes: number}[]} */
const requests = [];
/** @type {string[]} */
const read = [];
let context = await start();
let page = context.pages()[0] ?? (await context.newPage());

async function start() {
  const { defaultBrowserType: _, ...phone } = devices['Pixel 7'];
  const options = { ...phone, executablePath, headless: true, args: [...ARGS, '--disable-component-update', '--no-first-run'] };
  const started = await chromium.launchPersistentContext(profile, options);
  started.setDefaultTimeout(DEADLINE_MS);
  started.on('request', (/** @type {any} */ request) => {
    const body = request.postDataBuffer();
    requests.push({ url: request.url(), method: request.method(), bytes: body?.length ?? 0 });
  });
  return started;
}

/** @type {Record<string, (argument: any) => Promise<unknown>>} */
const ACTIONS = {
  open: (url) => page.goto(url),
  /** Wait until the page is in a state of `page.js`, or says what is wrong. */
  until: (state) => page.waitForSelector(`body[data-now=${state}], #error:not([hidden])`),
  untilStatus: (part) => page.waitForSelector(`#status:has-text("${part}")`),
  untilModel: (part) => page.waitForSelector(`#model:has-text("${part}")`),
  untilError: () => page.waitForSelector('#error:not([hidden])'),
  untilStep: (step) => page.waitForFunction((/** @type {number} */ n) => (document.querySelector('progress')?.value ?? 0) >= n, step),
  pick: (file) => page.setInputFiles('#file', file),
  tap: (id) => page.tap(`#${id}`),
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
  wait: (ms) => page.waitForTimeout(ms),
  /** Another tab, where the actions after it happen. */
  tab: async () => (page = await context.newPage()),
  /** The browser ends, with all its tabs, and is started again. */
  restart: async () => {
    await context.close();
    context = await start();
    page = context.pages()[0] ?? (await context.newPage());
  },
  offline: (is) => context.setOffline(is),
  /** Before a page is opened: a browser that lacks something, as a script takes it away. */
  without: (script) => context.addInitScript(script),
};

try {
  for (const [action, argument] of JSON.parse(await text(stdin))) await ACTIONS[action](argument);
  console.log(JSON.stringify({ read, requests }));
} finally {
  await context.close();
}
