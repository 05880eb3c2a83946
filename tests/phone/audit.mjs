/** What keeps people from using a page: controls without a name, faint text, what does not fit, the way of the Tab key. */

const ROLES = ['button', 'checkbox', 'combobox', 'image', 'img', 'link', 'list', 'progressbar', 'radio', 'radiogroup', 'group', 'region', 'textbox', 'DisclosureTriangle'];
const NAMELESS = ['list', 'group', 'image', 'img'];

/**
 * @param {any} page Page of Playwright.
 * @returns {Promise<{unnamed: string[], names: string[], faint: string[], wide: string[], small: string[], order: string[], visited: string[]}>}
 */
export async function audit(page) {
  const session = await page.context().newCDPSession(page);
  const { nodes } = await session.send('Accessibility.getFullAXTree');
  await session.detach();
  const controls = nodes.filter((/** @type {any} */ node) => !node.ignored && ROLES.includes(node.role?.value));
  const nameOf = (/** @type {any} */ node) => String(node.name?.value ?? '').trim();
  const unnamed = controls.filter((/** @type {any} */ node) => !nameOf(node) && !NAMELESS.includes(node.role.value));
  return {
    unnamed: unnamed.map((/** @type {any} */ node) => node.role.value),
    names: controls.map(nameOf).filter(Boolean),
    ...(await page.evaluate(look)),
    ...(await tabThrough(page)),
  };
}

/** Runs on the page: contrasts by computed styles (WCAG 2.2, 1.4.3), and what is wider than the screen or smaller than a finger. */
function look() {
  const channels = (/** @type {string} */ color) => (color.match(/[\d.]+/g) ?? []).map(Number);
  const isVisible = (/** @type {Element} */ element) => element.checkVisibility({ visibilityProperty: true }) && element.getClientRects().length > 0;
  /** @param {number[]} color */
  const luminance = (color) => {
    const [r, g, b] = color.slice(0, 3).map((value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  /** @param {Element | null} element
   * @returns {number[]} */
  const background = (element) => {
    const found = element ? channels(getComputedStyle(element).backgroundColor) : [255, 255, 255];
    return found[3] === 0 ? background(/** @type {Element} */ (element).parentElement) : found;
  };
  const faint = [], wide = [], small = [];
  for (const element of document.body.querySelectorAll('*')) {
    if (!isVisible(element)) continue;
    const { left, right, height, width } = element.getBoundingClientRect();
    if (right > innerWidth + 0.5 || left < -0.5) wide.push(`${element.tagName} ${element.id}`);
    const isControl = element.matches('button, select, textarea, #choices label, a[href]');
    if (isControl && Math.min(width, height) < 44) small.push(`${element.tagName} ${element.id} ${width}x${height}`);
    const hasText = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.textContent?.trim());
    if (!hasText || element.matches(':disabled')) continue;
    const [one, other] = [luminance(channels(getComputedStyle(element).color)), luminance(background(element))].sort((a, b) => b - a);
    const contrast = (one + 0.05) / (other + 0.05);
    if (contrast < 4.5) faint.push(`${element.tagName} ${element.id} ${contrast.toFixed(2)}`);
  }
  if (document.documentElement.scrollWidth > innerWidth) wide.push(`document ${document.documentElement.scrollWidth}`);
  return { faint, wide, small };
}

/**
 * Focusable elements in the order of the document, and as the Tab key comes to them, each with a mark that is seen.
 * @param {any} page
 */
async function tabThrough(page) {
  const order = await page.evaluate(() => {
    /** @param {Element} element */
    const label = (element) => element.id || element.getAttribute('aria-label') || element.textContent?.trim() || '';
    const all = [...document.querySelectorAll('a[href], button:not(:disabled), input:not(:disabled), select, textarea:not(:disabled), summary')];
    const reached = all.filter((element) => element.checkVisibility() && !(element.matches('[type=radio]') && !element.matches(':checked')));
    reached.forEach((element, i) => element.setAttribute('data-place', `${i} ${label(element)}`));
    // The next Tab begins before everything.
    document.body.tabIndex = -1;
    document.body.focus();
    document.body.removeAttribute('tabindex');
    return reached.map((element) => element.getAttribute('data-place'));
  });
  const visited = [];
  for (let i = 0; i < order.length; i++) {
    await page.keyboard.press('Tab');
    visited.push(
      await page.evaluate(() => {
        const found = document.activeElement, mark = found && getComputedStyle(found);
        return mark?.outlineStyle !== 'none' && mark?.outlineWidth !== '0px' ? found?.getAttribute('data-place') : `unmarked ${found?.id}`;
      }),
    );
  }
  return { order, visited };
}
