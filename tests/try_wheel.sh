#!/bin/sh
# Install the built wheel outside the checkout, as a device does, and run a round there: no torch, no onnx.
# usage: try_wheel.sh PYTHON FOLDER_WITH_WHEEL    PYTHON: an environment with the package and the [export] extra
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
wheel=$(ls "$(cd "$2" && pwd)"/fedpara_edge-*.whl)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/device"
"$work/device/bin/python" -m pip install --quiet --disable-pip-version-check -c "$here/constraints.txt" "$wheel[device]"
# onnxruntime-training asks pip for onnx and more, which only its Python classes need; ours must do without.
"$work/device/bin/python" -m pip uninstall --quiet --yes onnx h5py sympy mpmath
cd "$work"
"$python" -m fedpara_edge export mlp -o bundle --json >exported.json

PATH="$work/device/bin:/usr/bin:/bin"
unset PYTHONPATH
python -c "import fedpara_edge; assert 'site-packages' in fedpara_edge.__file__, fedpara_edge.__file__"
for module in torch onnx; do
    if python -c "import $module" 2>/dev/null; then
        echo "the device has $module: this test needs an environment without it" >&2
        exit 1
    fi
done
fedpara-edge doctor
fedpara-edge demo --help >help.txt
fedpara-edge demo --images images.npz
python - <<'PYTHON'
import numpy as np

data = np.load("images.npz")
for name, rows in {"one": slice(0, 300), "two": slice(300, 500)}.items():
    np.savez(f"{name}.npz", x=data["x_train"][rows], y=data["y_train"][rows])
np.savez("test.npz", x=data["x_test"][:500], y=data["y_test"][:500])
PYTHON
while read -r client engine codec; do
    fedpara-edge train bundle --data "$client.npz" --weights bundle/weights.safetensors --state "$client" \
        --client "$client" --epochs 5 --lr 0.1 --engine "$engine" --codec "$codec" -o "update-$client.safetensors"
done <<ENGINES
one ort-training float32
two onnxruntime int4
ENGINES
fedpara-edge aggregate update-*.safetensors --weights bundle/weights.safetensors -o round-1.safetensors
fedpara-edge inspect round-1.safetensors >inspected.txt
fedpara-edge evaluate bundle --weights round-1.safetensors --data test.npz --json >evaluation.json
"$python" -m fedpara_edge fold bundle --weights round-1.safetensors -o model.onnx
fedpara-edge predict model.onnx --data test.npz -o predictions.npz --json >prediction.json
python - <<'PYTHON'
import json

accuracy, folded = (json.load(open(f"{name}.json"))["accuracy"] for name in ("evaluation", "prediction"))
assert accuracy > 0.3, f"expected the wheel to learn something in a round, found accuracy {accuracy}"
assert abs(folded - accuracy) < 0.005, f"expected the folded model to predict like the factored one, found {folded}"
print(f"wheel: one round outside the checkout, without torch and onnx: accuracy {accuracy:.1%}, folded {folded:.1%}")
PYTHON
