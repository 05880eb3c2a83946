#!/bin/sh
# Install the project's wheel with an extra into a userland, as `pip install` on that machine would: it is the
# emulated Python that runs pip, and so decides which requirements and which wheels are for it. What Debian or the last
# call brought stays. Emulated without namespaces, so that this machine's files, network and pip settings are seen.
# usage: install.sh USERLAND PYTHON WHEEL [OPTION...]
#   PYTHON  of this machine: its pip is the one that is run
#   OPTION  of `pip install`
# The extra is [device] unless the environment has another in EXTRA.
set -eu
. "$(dirname "$0")/machines.sh"
userland=$(cd "$1" && pwd) python=$2 wheel=$3
shift 3
root=$userland/root
describe_machine "$(cat "$userland/architecture")"
# A folder with nothing but pip: what else lies beside it is not for that machine.
alone=$(mktemp -d)
trap 'rm -rf "$alone"' EXIT
trap 'exit 130' HUP INT TERM
ln -s "$("$python" -c 'import pathlib, pip; print(pathlib.Path(pip.__file__).parent)')" "$alone/pip"

emulated_python() {
    env -u PYTHONDONTWRITEBYTECODE QEMU_CPU=$cpu "$userland/qemu" -L "$root" "$root/usr/bin/python3" "$@"
}

echo "pi: $(basename "$wheel") and what it needs"
for name in fedpara_edge fedpara_edge-*.dist-info device_runtime export; do
    rm -rf "$root"/usr/local/lib/python3*/dist-packages/$name
done
PYTHONPATH=$alone PIP_BREAK_SYSTEM_PACKAGES=1 emulated_python -B -m pip install --quiet --quiet \
    --no-compile --no-cache-dir --root-user-action=ignore --no-warn-script-location --only-binary=:all: \
    "$@" "$wheel[${EXTRA:-device}]"
# pip wrote the name that this Python has here, which is not the one it has there.
sed -i "1s|^#!.*|#!/usr/bin/python3|" "$root/usr/local/bin/fedpara-edge"
# The first import, which leaves its bytecode for the devices.
emulated_python -c "import onnxruntime, device_runtime, fedpara_edge.cli.doctor, fedpara_edge.cli.train"
