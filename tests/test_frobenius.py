"""Laws of the Frobenius decay: the gradient of λ/2 ‖W‖² is added to that of the loss, once for each weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from norms import relative_error
from step_models import Twice, batch, net, run
from torch import nn
from torch.nn import functional as F

from device_runtime import open_engine
from export import export_bundle
from fedpara_edge.errors import InputError
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.nn import Conv2d, FactoredLayer, Linear

IMAGE, VECTOR, LAMBDA = (32, 6, 5), (12,), 0.3


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: net(Linear(12, 8, rank=2), nn.Tanh(), shape=VECTOR), VECTOR),
    "low-rank": (lambda: net(Linear(12, 8, rank=2, kind="lowrank"), nn.Tanh(), shape=VECTOR), VECTOR),
    "tanh": (lambda: net(Linear(12, 8, rank=2, tanh=True), nn.Tanh(), shape=VECTOR), VECTOR),
    "strided": (lambda: net(Conv2d(32, 6, 3, stride=2, rank=2), nn.Tanh(), shape=IMAGE), IMAGE),
    "Winograd": (lambda: net(Conv2d(32, 33, 3, padding=1, rank=3), nn.Tanh(), shape=IMAGE), IMAGE),
    "pfedpara": (lambda: net(Conv2d(32, 33, 3, padding=1, rank=3, kind="pfedpara"), nn.Tanh(), shape=IMAGE), IMAGE),
    "twice": (lambda: net(Twice(), nn.Tanh(), shape=IMAGE), IMAGE),
}


def exported(folder: Path, model: nn.Module, shape: tuple[int, ...], **options: Any) -> Bundle:
    given = {"frobenius_decay": LAMBDA, "engines": ("onnxruntime",), **options}
    return export_bundle(model, folder, ExportConfig(input_shape=shape, input_dtype="float32", **given))[0]


def decayed_gradient(model: nn.Module, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Gradient in torch of the loss and of λ/2 Σ ‖W‖², which are parts of one function here."""
    model.double().zero_grad()
    loss = F.cross_entropy(model(torch.from_numpy(x).double()), torch.from_numpy(y))
    layers = [layer for layer in model.modules() if isinstance(layer, FactoredLayer)]
    penalty = sum(layer.compose().square().sum() for layer in layers)
    (loss + LAMBDA / 2 * penalty).backward()
    return np.concatenate([parameter.grad.numpy().ravel() for parameter in model.parameters()])


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_that_of_torch(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make()
    bundle = exported(tmp_path / "bundle", model, shape)
    assert bundle.manifest.optimizer["frobenius_decay"] == LAMBDA
    for rows in (1, 5):
        x, y = batch(shape, rows)
        found = run(bundle, x, y)
        assert relative_error(found["gradient"], decayed_gradient(model, x, y)) < 1e-5
        loss = F.cross_entropy(model(torch.from_numpy(x).double()), torch.from_numpy(y)).item()
        np.testing.assert_allclose(found["loss"], loss, rtol=1e-5)


@pytest.mark.parametrize("micro_batches", [2, 5])
def test_micro_batches_add_it_once(micro_batches: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, shape = MODELS["linear"]
    bundle = exported(tmp_path / "bundle", make(), shape)
    x, y = batch(shape, 5)
    whole, parts = open_engine(bundle, "onnxruntime"), open_engine(bundle, "onnxruntime")
    whole.step(x, y, learning_rate=0.1, seed=0)
    parts.step(x, y, learning_rate=0.1, seed=0, micro_batches=micro_batches)
    for name, tensor in whole.read().items():
        np.testing.assert_allclose(parts.read()[name], tensor, rtol=1e-5, atol=1e-6)


def test_two_outputs_add_it_once(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.first, self.second = Linear(12, 8, rank=2), nn.Linear(8, 5), nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            hidden = self.body(x)
            return {"first": self.first(hidden), "second": self.second(hidden)}

    torch.manual_seed(0)
    model, losses = Two(), ("first=cross_entropy", "second=cross_entropy")
    (x, y), factors = batch(VECTOR, 4), [name for name, _ in Two().named_parameters() if name.startswith("body")]
    changes = {}
    for strength in (0.0, LAMBDA):
        bundle = exported(tmp_path / f"{strength}", model, VECTOR, loss=losses, frobenius_decay=strength)
        engine = open_engine(bundle, "onnxruntime")
        before = engine.read()
        engine.step({"x": x}, {"y_first": y, "y_second": y}, learning_rate=0.1, seed=0)
        changes[strength] = {name: engine.read()[name] - before[name] for name in before}
    penalty = LAMBDA / 2 * model.body.compose().square().sum()
    penalty.backward()
    gradients = dict(model.named_parameters())
    for name in factors:
        expected = 0.0 if gradients[name].grad is None else -0.1 * gradients[name].grad.numpy()
        np.testing.assert_allclose(changes[LAMBDA][name] - changes[0.0][name], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"engines": ("ort-training",)}, "engines: expected onnxruntime alone with frobenius_decay"),
        ({"jacobian_correction": 1.0}, "frobenius_decay: expected one of both"),
        ({"frobenius_decay": -1.0}, "frobenius_decay: expected a number of at least 0"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=text):
        exported(tmp_path / "bundle", MODELS["linear"][0](), VECTOR, **options)


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (lambda: nn.Linear(12, 8), "frobenius_decay: expected a layer with trained factors, found none"),
        (lambda: Linear(12, 8, rank=2, kind="update"), "frobenius_decay: expected 0 for kind update"),
    ],
)
def test_a_model_without_such_weights_is_refused(layer: Callable[[], nn.Module], text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=text):
        exported(tmp_path / "bundle", net(layer(), nn.Tanh(), shape=VECTOR), VECTOR)
    assert not (tmp_path / "bundle").exists()
