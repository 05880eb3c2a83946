#!/bin/sh
# Print the path of the browser for the emulated phones: CHROMIUM, or one that is there, or Debian's Chromium, which is
# installed where this user may.
# usage: browser.sh
set -eu
for name in ${CHROMIUM:-chromium chromium-browser google-chrome}; do
    command -v "$name" && exit
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    { apt-get update --quiet=2 && apt-get install --quiet=2 --yes --no-install-recommends chromium; } >&2
    command -v chromium && exit
fi
echo "phone: expected Chromium, found none; run: sudo apt install chromium, or set CHROMIUM to its path" >&2
exit 1
