"""A verification is sharp: for every kind of parameter it refuses a gradient that is wrong in any of the usual ways.

The files of small models are right, and their results are damaged on the way to the verification: as a wrong sign, a
scale that is off by a thousandth, a term that is missing or axes in another order in the graph would.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from export import export_bundle, exporter
from export.attempts import EngineError
from export.batches import Batch
from export.trials import Results, Trial
from export.verify import Verification, verify
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.nn import Conv2d, Linear

Gradient = np.ndarray[Any, Any]
Damage = Callable[[Gradient, float], Gradient]
"""Function from a right gradient, and the norm of all gradients together, to a wrong one."""


def another_order(gradient: Gradient, _: float) -> Gradient:
    """Axes swapped where that leaves the shape, else all entries reversed."""
    square = gradient.ndim > 1 and gradient.shape[0] == gradient.shape[1] > 1
    return gradient.swapaxes(0, 1) if square else gradient.ravel()[::-1].reshape(gradient.shape)


DAMAGES: dict[str, Damage] = {
    "wrong sign": lambda gradient, _: -gradient,
    "scale": lambda gradient, _: gradient * np.float32(1.001),
    "axes": another_order,
    "missing": lambda gradient, _: np.where(np.abs(gradient) == np.abs(gradient).max(), 0, gradient),
}
"""Damages that any gradient shows that is not zero but for rounding."""


def noise(gradient: Gradient, total: float) -> Gradient:
    """Damage that any other gradient shows: a thousandth of all gradients together added to it."""
    return gradient + np.float32(1e-3 * total / np.sqrt(gradient.size))


class Token(nn.Module):
    """An embedding, a class token, a norm without batch, and recurrent weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.token = nn.Embedding(11, 6), nn.Parameter(torch.randn(1, 1, 6))
        self.norm, self.recurrent, self.head = nn.LayerNorm(6), nn.GRU(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.embedding(x)], 1)
        return self.head(self.recurrent(self.norm(x))[0][:, -1])


def normalized() -> nn.Module:
    """Biases that normalizations take away, rectifiers and maxima."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.InstanceNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        Conv2d(8, 16, 3, rank=3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=16, bias=False),
        nn.ConvTranspose2d(16, 4, 2, 2),
        nn.Flatten(),
        nn.Linear(256, 5),
    )


def factored() -> nn.Module:
    """All kinds of factors."""
    return nn.Sequential(
        Linear(12, 16, rank=3),
        nn.Tanh(),
        Linear(16, 16, rank=3, kind="lowrank"),
        nn.GELU(),
        Linear(16, 16, rank=3, kind="pfedpara"),
        nn.SiLU(),
        nn.Linear(16, 5),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "normalized": (normalized, {"input_shape": (1, 12, 12)}),
    "factored": (factored, {"input_shape": (12,)}),
    "tokens": (Token, {"input_shape": (4,), "input_dtype": "int64", "tokens": 11}),
}


class Remembered:
    """The reference, which computes every batch once."""

    def __init__(self, reference: Any) -> None:
        self._reference, self._found = reference, {}
        self.weights = reference.weights

    def __getattr__(self, name: str) -> Callable[..., Results]:
        def call(batch: Batch, **options: Any) -> Results:
            key = (name, *(array.tobytes() for array in batch.arrays), *options.items())
            if key not in self._found:
                self._found[key] = getattr(self._reference, name)(batch, **options)
            return self._found[key]

        return call


class Damaged:
    """A trial with a wrong gradient of one tensor."""

    def __init__(self, trial: Trial, name: str, damage: Damage) -> None:
        self._trial, self._name, self._damage = trial, name, damage

    def run(self, batch: Batch) -> Results:
        results = self._trial.run(batch)
        total = float(np.sqrt(sum(np.sum(gradient**2) for gradient in results.gradients.values())))
        gradients = dict(results.gradients)
        gradients[self._name] = self._damage(gradients[self._name], total)
        return replace(results, gradients=gradients)

    def step(self) -> Mapping[str, Gradient] | None:
        return None


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_wrong_gradient_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, options = MODELS[name]
    refused: dict[tuple[str, str], str] = {}

    def attack(openers: Mapping[str, Any], reference: Any, **more: Any) -> dict[str, Verification]:
        known = Remembered(reference)
        right = verify(openers, known, **more)
        (trial,) = (opener() for opener in openers.values())
        exact = known.exact(more["batches"].draw(1, 0)).gradients
        total = float(np.sqrt(sum(np.sum(gradient**2) for gradient in exact.values())))
        for tensor, gradient in exact.items():
            is_zero = np.linalg.norm(gradient) <= 1e-8 * total
            for kind, damage in ({"noise": noise} if is_zero else DAMAGES).items():
                if gradient.size == 1 and kind == "axes":
                    continue
                opener = functools.partial(Damaged, trial, tensor, damage)
                with pytest.raises(EngineError, match=f"gradient of '{tensor}': expected torch's result") as caught:
                    verify({"onnxruntime": opener}, known, **more)
                refused[tensor, kind] = str(caught.value)
        return right

    monkeypatch.setattr(exporter, "verify", attack)
    torch.manual_seed(0)
    config = ExportConfig(name=name, engines=("onnxruntime",), **options)
    bundle, _ = export_bundle(make(), tmp_path / "bundle", config)
    trained = {tensor.name for tensor in bundle.manifest.layout.with_role("shared", "personal")}
    assert {tensor for tensor, _ in refused} == trained
    if name == "normalized":
        assert {tensor for tensor, kind in refused if kind == "noise"} == {"0.bias"}
