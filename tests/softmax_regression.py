"""A bundle and an engine in plain numpy, for tests of the device's loop: softmax regression with momentum.

Its weight is shared and its bias personal; the seed of a step blanks inputs (dropout), so that weights, optimizer state
and seeds all leave their trace in the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from failing_disk import PowerCutError
from numpy.typing import NDArray

from device_runtime.engines.protocol import NONE, Adjustment, Given, Outcome, named
from fedpara_edge.factors.layout import LayerSpec, Layout, TensorSpec
from fedpara_edge.formats.bundle import (
    WEIGHTS,
    Bundle,
    Manifest,
    open_bundle,
    write_initial_personal,
    write_manifest,
)
from fedpara_edge.formats.interface import ArraySpec, Head, Interface
from fedpara_edge.formats.weights import Weights, read_weights, write_weights
from fedpara_edge.losses import find_loss

FEATURES, CLASSES = 4, 3


def make_bundle(folder: Path, *, personal: bool = True, seed: int = 0) -> Bundle:
    """Write and open a bundle; other seeds have another fingerprint."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    manifest = make_manifest(personal=personal, graph=f"softmax regression {seed}")
    weight = rng.standard_normal((CLASSES, FEATURES), np.float32)
    bias = rng.standard_normal(CLASSES, np.float32)
    tensors = {"fc.weight": weight} if personal else {"fc.weight": weight, "fc.bias": bias}
    write_weights(folder / WEIGHTS, Weights(manifest.fingerprint, 0, manifest.layout, tensors))
    write_initial_personal(folder, {"fc.bias": bias} if personal else {})
    write_manifest(folder, manifest)
    return open_bundle(folder)


def make_manifest(
    *,
    personal: bool = False,
    loss: str = "cross_entropy",
    x: tuple[int, ...] = (FEATURES,),
    y: tuple[int, ...] = (),
    dtype: str = "float32",
    graph: str = "",
) -> Manifest:
    """The manifest of such a bundle; with other shapes or another loss, for data only."""
    classes = CLASSES if loss == "cross_entropy" else None
    layer = LayerSpec(
        name="fc", operator="linear", kind="dense", form="matrix", shape=(CLASSES, FEATURES), rank=0, tanh=False
    )
    weight = TensorSpec(name="fc.weight", shape=layer.shape, dtype="float32", layer="fc", part="weight", role="shared")
    bias = TensorSpec(
        name="fc.bias",
        shape=(CLASSES,),
        dtype="float32",
        layer="fc",
        part="bias",
        role="personal" if personal else "shared",
    )
    return Manifest(
        model="softmax regression",
        layout=Layout((layer,), (weight, bias)),
        interface=Interface(
            inputs=(ArraySpec("x", x, dtype),),
            heads=(
                Head(
                    ArraySpec("output", (CLASSES,), "float32"),
                    ArraySpec("y", y, "float32" if classes is None else "int64", classes),
                    find_loss(loss),
                ),
            ),
        ),
        optimizer={"name": "sgd", "momentum": 0.9},
        engines=(),
        graph=graph,
        local=None,
        files={},
    )


def write_npz(path: Path, *, examples: int = 23, seed: int = 0) -> Path:
    """Write examples that fit the bundle."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((examples, FEATURES), np.float32)
    np.savez(path, x=x, y=rng.integers(0, CLASSES, examples))
    return path


class SoftmaxRegression:
    """The engine: cross entropy of softmax(x Wᵀ + b), stochastic gradient descent with momentum 0.9."""

    name = "softmax-regression"

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.tensors = {**read_weights(bundle.file(WEIGHTS)).tensors, **bundle.read_initial_personal()}
        self.velocity = {name: np.zeros_like(tensor) for name, tensor in self.tensors.items()}
        self.steps_taken = 0
        self.settings = (NONE, 1)

    def load(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        for name, tensor in tensors.items():
            self.tensors[name][...] = tensor

    def step(
        self,
        x: Given,
        y: Given,
        *,
        learning_rate: float,
        seed: int,
        adjustment: Adjustment = NONE,
        micro_batches: int = 1,
    ) -> float:
        self.settings = (adjustment, micro_batches)
        x, y = self.arrays(x, y)
        kept = x * (np.random.default_rng(seed).random(x.shape) > 0.2).astype(np.float32)
        outcome = self.evaluate(kept, y)
        (loss,), output = outcome.losses, outcome.outputs["output"]
        error = np.exp(output - output.max(axis=1, keepdims=True))
        error /= error.sum(axis=1, keepdims=True)
        error[np.arange(len(y)), y] -= 1
        gradients = {"fc.weight": error.T @ kept / len(y), "fc.bias": error.mean(axis=0)}
        norm = float(np.sqrt(sum(np.square(gradient).sum() for gradient in gradients.values())))
        scale = np.float32(min(1.0, adjustment.max_norm / (norm + 1e-6)))
        for name, gradient in gradients.items():
            gradient = scale * gradient
            self.velocity[name] = np.float32(0.9) * self.velocity[name] + gradient
            self.tensors[name] -= np.float32(learning_rate) * self.velocity[name]
        self.steps_taken += 1
        return loss

    def evaluate(self, x: Given, y: Given) -> Outcome:
        x, y = self.arrays(x, y)
        output = x @ self.tensors["fc.weight"].T + self.tensors["fc.bias"]
        peak = output.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(output - peak).sum(axis=1)) + peak[:, 0]
        return Outcome((float((log_sum - output[np.arange(len(y)), y]).mean()),), {"output": output})

    def arrays(self, x: Given, y: Given) -> tuple[NDArray[Any], NDArray[Any]]:
        """Input and label."""
        interface = self.bundle.interface
        return named(x, interface.inputs)["x"], named(y, interface.labels)["y"]

    def read(self) -> dict[str, NDArray[np.float32]]:
        return {name: tensor.copy() for name, tensor in self.tensors.items()}

    def state(self) -> dict[str, NDArray[Any]]:
        velocity = {f"velocity/{name}": tensor.copy() for name, tensor in self.velocity.items()}
        return {**self.read(), **velocity}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        self.tensors = {name: state[name].copy() for name in self.tensors}
        self.velocity = {name: state[f"velocity/{name}"].copy() for name in self.velocity}


class CutShort(SoftmaxRegression):
    """An engine whose power is cut during the step after `after` of them."""

    def __init__(self, bundle: Bundle, after: int) -> None:
        super().__init__(bundle)
        self.after = after

    def step(self, *batch: Any, **options: Any) -> float:
        if self.steps_taken == self.after:
            raise PowerCutError
        return super().step(*batch, **options)
