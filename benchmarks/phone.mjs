/**
 * A headless Chromium for `phone.py`, which does what it is told on the phone's page.
 *
 * usage: node phone.mjs CHROMIUM < ACTIONS    a line of JSON for each action, [action, argument], and one for its answer
 */

import { createRequire } from 'node:module';
import { argv, stdin } from 'node:process';
import { createInterface } from 'node:readline';
import { readFile } from 'node:fs/promises';

const { chromium } = createRequire(new URL('../device_runtime/web/package.json', import.meta.url))('playwright-core');
const [executablePath] = argv.slice(2);
const browser = await chromium.launch({ executablePath, headless: true, args: ['--no-sandbox', '--disable-gpu'] });
const session = await browser.newBrowserCDPSession();
let page = await browser.newPage();

/** @type {Record<string, (argument: any) => Promise<unknown>>} */
const ACTIONS = {
  /** Go to the origin and policy of a page, without what it does. */
  site: async (address) => {
    await page.goto(new URL('page.css', address).href);
  },
  /** What a function of a module beside the page gives for some arguments, or the sentence of its error. */
  call: ([module, name, ...given]) => page.evaluate(call, { module, name, given }),
  /** Seconds from a cold start of the page to the first step of a training: nothing of it is in the browser before. */
  start: async ([link, data]) => {
    await page.context().close();
    page = await (await browser.newContext()).newPage();
    const begun = performance.now();
    await page.goto(link);
    await page.waitForSelector('body[data-now=ready]');
    await page.setInputFiles('#file', data);
    await page.click('#start');
    await page.waitForFunction(() => (document.querySelector('progress')?.value ?? 0) > 0);
    return (performance.now() - begun) / 1000;
  },
  /** Most memory in MiB that a process of a page had resident. */
  memory: async () => {
    const { processInfo } = await session.send('SystemInfo.getProcessInfo');
    const pages = processInfo.filter((/** @type {any} */ { type }) => type === 'renderer');
    const peaks = pages.map(async (/** @type {any} */ { id }) => {
      const status = await readFile(`/proc/${id}/status`, 'utf8').catch(() => '');
      return Number(/VmHWM:\s+(\d+) kB/.exec(status)?.[1] ?? 0) / 1024;
    });
    return Math.max(...(await Promise.all(peaks)));
  },
};

/**
 * Runs on the page.
 * @param {{module: string, name: string, given: unknown[]}} what
 */
async function call({ module, name, given }) {
  const functions = await import(module);
  return functions[name](...given).catch((/** @type {unknown} */ error) => ({ error: String(error) }));
}

try {
  for await (const line of createInterface({ input: stdin })) {
    const [action, argument] = JSON.parse(line);
    console.log(JSON.stringify((await ACTIONS[action](argument)) ?? null));
  }
} finally {
  await browser.close();
}
