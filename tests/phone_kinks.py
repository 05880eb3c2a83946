"""How far a phone's engine moves from Python's in a few steps, with and without kinks in the model.

usage: python tests/phone_kinks.py [MODEL ...]

Prints, for each model, the relative difference of the changes of onnxruntime-web, under Node, and of onnxruntime, and
that of two of onnxruntime, one from weights that were moved by one part in 10^7. Where a model has no kinks (`smooth`
has GELU and mean pooling in place of ReLU and max pooling), both stay where rounding is; where it has, both grow: an
entry that is rounded to the other side of a kink gets another gradient.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from norms import relative_error
from numpy.typing import NDArray
from phone_tools import PHONE, run_node
from small_net import without_verification
from torch import nn

from device_runtime import TrainConfig, open_data, open_engine, train
from export import export_bundle
from fedpara_edge.codecs import find_encoder
from fedpara_edge.codecs.codec import in_order
from fedpara_edge.demo import IMAGES
from fedpara_edge.formats.bundle import WEIGHTS, Bundle
from fedpara_edge.formats.encoded import read_change
from fedpara_edge.formats.inputs import InputDtype
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.formats.update import open_update
from fedpara_edge.formats.weights import Weights, read_weights, write_weights
from fedpara_edge.nn.zoo import ZOO

STEPS, TINY = (1, 5), 1e-7
KINDS = (
    *("orders", "step_seeds", "micro_batch_seeds", "random_floats", "rates"),
    *("data", "codecs", "weights", "signatures"),
)


def smoothed(model: nn.Module, kinds: dict[type[nn.Module], Callable[[], nn.Module]]) -> nn.Module:
    """A model with other activations and poolings."""
    for name, child in model.named_children():
        replaced = kinds.get(type(child))
        setattr(model, name, replaced() if replaced else smoothed(child, kinds))
    return model


def cnn() -> nn.Module:
    return ZOO["cnn"].factory()


def mean_pool() -> nn.Module:
    return nn.AvgPool2d(2)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "cnn": (cnn, (1, 28, 28), 32),
    "cnn, max pooling alone": (lambda: smoothed(cnn(), {nn.ReLU: nn.GELU}), (1, 28, 28), 32),
    "cnn, ReLU alone": (lambda: smoothed(cnn(), {nn.MaxPool2d: mean_pool}), (1, 28, 28), 32),
    "cnn, smooth": (lambda: smoothed(cnn(), {nn.ReLU: nn.GELU, nn.MaxPool2d: mean_pool}), (1, 28, 28), 32),
    "char-lstm": (lambda: ZOO["char-lstm"].factory(), (80,), 8),
    "resnet18": (lambda: ZOO["resnet18"].factory(), (3, 32, 32), 8),
    "resnet18, smooth": (lambda: smoothed(ZOO["resnet18"].factory(), {nn.ReLU: nn.GELU}), (3, 32, 32), 8),
}


def write_data(path: Path, shape: tuple[int, ...], rows: int) -> None:
    """Examples: Fashion-MNIST for gray images, and random ones for others."""
    random = np.random.default_rng(0)
    if shape == (1, 28, 28):
        with np.load(IMAGES) as images:
            np.savez(
                path, x=images["x_train"][:rows].reshape(rows, *shape), y=images["y_train"][:rows].astype(np.int64)
            )
    elif len(shape) == 1:
        text = random.integers(0, 80, (rows, shape[0] + 1))
        np.savez(path, x=text[:, :-1], y=text[:, 1:])
    else:
        np.savez(path, x=random.integers(0, 256, (rows, *shape), np.uint8), y=random.integers(0, 10, rows))


def change_in(update: Path, weights: Weights) -> NDArray[np.float32]:
    opened = open_update(update, weights)
    try:
        return read_change(opened.file, in_order(weights.layout.shared))
    finally:
        opened.close()


def native(bundle: Bundle, folder: Path, weights: Weights, name: str, settings: dict[str, Any]) -> NDArray[np.float32]:
    """Change of the Python device from some weights."""
    path = folder / f"{name}.weights"
    write_weights(path, weights)
    engine, data = open_engine(bundle, "onnxruntime", threads=1), open_data(folder / "data.npz", bundle.manifest)
    train(
        engine, data, path, TrainConfig(**settings), output=folder / f"{name}.update", encoder=find_encoder("float32")
    )
    return change_in(folder / f"{name}.update", weights)


def web(bundle: Bundle, folder: Path, weights: Weights, settings: dict[str, Any]) -> NDArray[np.float32]:
    """Change of the phone's modules from the same weights."""
    call = {
        "name": "kinks", "bundle": bundle.path.name, "weights": "base.weights", "data": "data.npz", "client": "device",
        "settings": {**settings, "codec": "float32"}, "update": "web.update",
    }  # fmt: skip
    (folder / "vectors.json").write_text(
        json.dumps({**{kind: [] for kind in KINDS}, "calls": [call]}), encoding="utf-8"
    )
    run_node(PHONE / "answers.mjs", folder, folder)
    return change_in(folder / "web.update", weights)


def differences(name: str, steps: int) -> tuple[float, float]:
    """Relative difference of the phone's change, and of Python's from weights that were moved a little."""
    make, shape, batch = MODELS[name]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        torch.manual_seed(0)
        dtype: InputDtype = "int64" if len(shape) == 1 else "uint8"
        tokens = {"tokens": 80} if dtype == "int64" else {"mean": (0.286,), "std": (0.353,)}
        config = ExportConfig(name=name, input_shape=shape, input_dtype=dtype, engines=("onnxruntime",), **tokens)
        with without_verification():
            bundle, *_ = export_bundle(make(), folder / "bundle", config)
        write_data(folder / "data.npz", shape, steps * batch)
        settings = {"batch_size": batch, "lr": 0.05, "seed": 1}
        weights, random = read_weights(bundle.file(WEIGHTS)), np.random.default_rng(0)
        moved = {
            tensor: values * (1 + TINY * random.standard_normal(values.shape)).astype(np.float32)
            for tensor, values in weights.tensors.items()
        }
        expected = native(bundle, folder, weights, "base", settings)
        nudged = native(bundle, folder, replace(weights, tensors=moved), "moved", settings)
        return relative_error(web(bundle, folder, weights, settings), expected), relative_error(nudged, expected)


def main() -> None:
    print("| model | steps | onnxruntime-web | onnxruntime, weights moved by 1e-7 |\n|---|---|---|---|")
    for name in sys.argv[1:] or MODELS:
        for steps in STEPS:
            of_web, of_moved = differences(name, steps)
            print(f"| {name} | {steps} | {of_web:.1e} | {of_moved:.1e} |", flush=True)


if __name__ == "__main__":
    main()
