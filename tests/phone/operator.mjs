/**
 * A browser on the operator's page, which does what it is told.
 *
 * usage: node operator.mjs CHROMIUM OPTIONS < ACTIONS    OPTIONS is JSON, of a browser's context; ACTIONS is JSON, a list
 * of [action, argument]. Each read of a page is printed as a line of JSON as soon as it is there.
 */

import { createRequire } from 'node:module';
import { argv, stdin } from 'node:process';
import { createInterface } from 'node:readline';

const { chromium } = createRequire(new URL('../../device_runtime/web/package.json', import.meta.url))('playwright-core');
const [executablePath, options] = argv.slice(2);
const browser = await chromium.launch({ executablePath, headless: true, args: ['--no-sandbox', '--disable-gpu'] });
const page = await (await browser.newContext(JSON.parse(options))).newPage();
page.setDefaultTimeout(60_000);

/** @param {unknown} value */
const tell = (value) => console.log(JSON.stringify(value));

/** @type {Record<string, (argument: any) => Promise<unknown>>} */
const ACTIONS = {
  open: (url) => page.goto(url),
  /** Wait for a text anywhere on the page, and tell that it is there. */
  until: async (text) => tell(await page.getByText(text).first().innerText()),
  read: async (selector) => tell(await page.innerText(selector)),
  /** Names and roles as a screen reader has them. */
  names: async () => tell(await page.locator('body').ariaSnapshot()),
  press: (key) => page.keyboard.press(key),
  /** Move on with the keyboard until the focus is on an element. */
  tabTo: async (id) => {
    for (let count = 0; count < 30; count++) {
      if ((await page.evaluate('document.activeElement?.id')) === id) return;
      await page.keyboard.press('Tab');
    }
    throw new Error(`no way to ${id} by keyboard`);
  },
  /** How much wider the page is than the window. */
  overflow: async () => tell(await page.evaluate('document.documentElement.scrollWidth - innerWidth')),
  draw: (path) => page.screenshot({ path, fullPage: true }),
};

try {
  for await (const line of createInterface({ input: stdin })) {
    const [action, argument] = JSON.parse(line);
    await ACTIONS[action](argument);
    tell(`${action} done`);
  }
} finally {
  await browser.close();
}
