#!/bin/sh
# Train, evaluate and predict with the engine onnxruntime from the built wheel, on other Pythons and other releases of
# onnxruntime than the project's own, and hold what comes out against what its own environment makes of the same.
# usage: try_versions.sh PYTHON FOLDER_WITH_WHEEL [quick]
#   PYTHON  an environment with the package and the [export] extra
#   quick   one combination, the first whose Python is here
# The Pythons are looked for in PATH and among pyenv's. One that is not here is skipped; at least one must be.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
wheel=$(ls "$(cd "$2" && pwd)"/fedpara_edge-*.whl)
extent=${3-all}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' HUP INT TERM
unset PYTHONPATH
tried=0 skipped=0

# Prints where a Python $1 is that can make environments, or nothing.
find_python() {
    pyenv=$(pyenv root 2>/dev/null) || pyenv=${HOME-}/.pyenv
    for candidate in "$(command -v "python$1")" "$pyenv/versions/$1".*/bin/"python$1"; do
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
}

# What a device does, with the Python $1, in the working directory.
train() {
    "$1" -m fedpara_edge doctor --json >doctor.json
    while read -r model rate; do
        "$1" -m fedpara_edge train "$work/$model" --data "$work/$model.npz" --client device --lr "$rate" \
            --engine onnxruntime --threads 1 -o "$model.safetensors" >"$model.txt"
    done <<RATES
mlp 0.1
cnn 0.01
tokens 0.001
RATES
}
measure() {
    for model in mlp cnn tokens; do
        "$1" -m fedpara_edge evaluate "$work/$model" --weights "$work/$model-round-1.safetensors" \
            --data "$work/$model-test.npz" --engine onnxruntime --threads 1 --json >"$model.json"
    done
    for precision in float32 float16 int8; do
        "$1" -m fedpara_edge predict "$work/cnn-$precision.onnx" --data "$work/cnn-test.npz" --threads 1 \
            -o "cnn-$precision.npz" >"cnn-$precision.txt"
    done
}

# Does all that in a fresh environment with Python $1 and what pip makes of the other arguments, first the onnxruntime.
try_with() {
    if [ "$extent" = quick ] && [ "$tried" -gt 0 ]; then
        return
    fi
    interpreter=$(find_python "$1")
    heading="python$1 with $(basename "$2")"
    shift
    if [ -z "$interpreter" ]; then
        echo "versions: skipped: $heading: no such Python here" >&2
        skipped=$((skipped + 1))
        return
    fi
    echo "versions: $heading"
    start=$(date +%s)
    device=$work/device
    cd "$work"
    rm -rf "$device"
    "$interpreter" -m venv "$device"
    "$device/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
    "$device/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$wheel"
    mkdir "$device/home"
    cd "$device/home"
    train "$device/bin/python"
    measure "$device/bin/python"
    "$python" "$work/compare.py" "$work/own" "$device/home"
    echo "  in $(($(date +%s) - start)) s"
    tried=$((tried + 1))
}

cat >"$work/compare.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import numpy as np

from fedpara_edge.codecs.codec import in_order
from fedpara_edge.formats.encoded import open_encoded, read_change
from fedpara_edge.formats.weights import read_weights

TOLERANCE = 1e-4


def change_in(bundle, path):
    """The change of all shared tensors [P]."""
    weights = read_weights(bundle / "weights.safetensors")
    with open_encoded(path, weights) as update:
        return read_change(update, in_order(weights.layout.shared)).astype(np.float64)


def apart(found, expected):
    """The distance, in parts of what was expected."""
    return float(np.linalg.norm(np.subtract(found, expected)) / np.linalg.norm(expected))


def expect(holds, expected, found):
    if not holds:
        raise SystemExit(f"versions: expected {expected}, found {found}")


own, device = (Path(argument) for argument in sys.argv[1:])
doctor = json.loads((device / "doctor.json").read_text())
expect("onnxruntime" in doctor["engines"], "an environment with the engine onnxruntime", doctor["engines"])
versions = doctor["capabilities"]["server"]["versions"] | doctor["capabilities"]["device"]["versions"]
updates, losses, outputs, labels = {}, {}, {}, {}
for model in ("mlp", "cnn", "tokens"):
    updates[model] = apart(*(change_in(own.parent / model, home / f"{model}.safetensors") for home in (device, own)))
    losses[model] = apart(*(json.loads((home / f"{model}.json").read_text())["loss"] for home in (device, own)))
for precision in ("float32", "float16", "int8"):
    found, expected = (dict(np.load(home / f"cnn-{precision}.npz")) for home in (device, own))
    labels[precision] = float(np.mean(found.pop("predicted") == expected.pop("predicted")))
    outputs[precision] = apart(*found.values(), *expected.values())
print(f"  Python {doctor['python']}, numpy {versions.pop('numpy')}, {' '.join(versions.popitem())}")
print("  apart from the project's own environment, relative:")
for what, errors in {"updates": updates, "losses": losses, "outputs": outputs}.items():
    print(f"    {what:8}", ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
compared = [*updates.values(), *losses.values(), outputs["float32"]]
expect(all(error < TOLERANCE for error in compared), f"updates, losses and float32 within {TOLERANCE}", compared)
expect(min(labels.values()) > 0.98, "the same predictions", labels)
PYTHON

cd "$work"
cat >tokens.py <<'PYTHON'
from torch import nn


def net() -> nn.Module:
    """Pixels as tokens [B, 49] to logits [B, 10]."""
    body = [nn.Flatten(), nn.Linear(49 * 8, 64), nn.LayerNorm(64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, 10)]
    return nn.Sequential(nn.Embedding(16, 8), *body)
PYTHON
"$python" - "$here/fedpara_edge/demo/fashion_mnist_12k.npz" <<'PYTHON'
import sys

import numpy as np

data = np.load(sys.argv[1])
for suffix, part, rows in (("", "train", slice(0, 320)), ("-test", "test", slice(0, 500))):
    x, y = data[f"x_{part}"][rows], data[f"y_{part}"][rows]
    for model in ("mlp", "cnn"):
        np.savez(f"{model}{suffix}.npz", x=x, y=y)
    np.savez(f"tokens{suffix}.npz", x=x[:, 0, ::4, ::4].reshape(-1, 49) // 16, y=y)
PYTHON
"$python" -m fedpara_edge export mlp -o mlp --json >exported.json
"$python" -m fedpara_edge export cnn --momentum 0.9 --mean 0.286 --std 0.353 --engines onnxruntime -o cnn \
    --json >exported.json
"$python" -m fedpara_edge export tokens.py:net --input-shape 49 --input-dtype int64 --tokens 16 --optimizer adamw \
    -o tokens --json >exported.json
mkdir own
cd own
train "$python"
for model in mlp cnn tokens; do
    "$python" -m fedpara_edge aggregate $model.safetensors --weights "$work/$model/weights.safetensors" \
        -o "$work/$model-round-1.safetensors" >aggregated.txt
done
for precision in float32 float16 int8; do
    "$python" -m fedpara_edge fold "$work/cnn" --weights "$work/cnn-round-1.safetensors" --precision $precision \
        --data "$work/cnn.npz" --max-drop 5 -o "$work/cnn-$precision.onnx" >folded.txt
done
measure "$python"

needed="numpy click safetensors"
grep -v "^onnxruntime" "$here/constraints.txt" >"$work/others.txt"
try_with 3.13 "$wheel[device]" # whatever pip chooses
try_with 3.11 onnxruntime==1.20.1 $needed -c "$work/others.txt"
try_with 3.12 onnxruntime==1.23.1 $needed -c "$work/others.txt"
try_with 3.13 onnxruntime $needed # the newest
try_with 3.11 onnxruntime-training-cpu==1.19.2 $needed -c "$work/others.txt"
echo "versions: $tried tried, $skipped skipped"
if [ "$tried" -eq 0 ]; then
    echo "versions: expected one of these Pythons, found none" >&2
    exit 1
fi
