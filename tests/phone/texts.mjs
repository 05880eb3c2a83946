/** The page's texts and the keys that its HTML asks for, as JSON. usage: node texts.mjs */

import { ENGLISH, LANGUAGES } from '../../device_runtime/web/screen/texts.js';

console.log(JSON.stringify({ keys: Object.keys(ENGLISH), ...Object.fromEntries(Object.entries(LANGUAGES).map(([code, { texts }]) => [code, texts])) }));
