"""The zoo in training: random batches for every model, and torch as the reference, whose steps an engine can follow."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from norms import norm
from small_net import OPTIONS, torch_optimizer, without_verification
from torch import nn
from torch.nn import functional as F

from device_runtime import Adjustment
from device_runtime.engines.protocol import NONE, Engine
from export import export_bundle, exporter
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.nn import ZOO
from fedpara_edge.nn.zoo import RESNET18_STAGES, VGG16_STAGES

Changes = dict[str, np.ndarray]
"""By tensor, new values less old ones, in double precision."""

_NEGLIGIBLE = 1e-3
_ROUNDING, _PERTURBATIONS, _LIKENESS = 1e-6, 8, 10.0  # as in export.comparison


@dataclass(frozen=True)
class ZooCase:
    """How a model of the zoo is trained.

    `rate` and `small_rate` multiply the learning rates of steps taken one by one, and in a row.
    """

    rows: int
    shape: tuple[int, ...]
    small_rate: float
    rate: float = 1.0


NARROW: Mapping[str, Mapping[str, Any]] = {
    "resnet18": {"stages": [n // 4 for n in RESNET18_STAGES]},
    "vgg16": {"stages": [[n // 8 for n in stage] for stage in VGG16_STAGES]},
}
"""Sizes of the deep models for speed, with all their layers; whole they are verified in the tests of the export.

At an eighth of its width and with inputs of 8x8, a step of resnet18 is ill-conditioned, as its last stage has one
position and GroupNorm few values: over 20 batches, its relative error against torch in double precision was 2e-4 to
4e-4 in the median and 1e-2 to 6e-2 at most, alike for torch in float32 and both engines; at a quarter, 1e-5 to 3e-5.
"""

ZOO_CASES = {
    "mlp": ZooCase(16, (1, 28, 28), 50.0),
    "cnn": ZooCase(8, (1, 28, 28), 5.0),
    "resnet18": ZooCase(2, (3, 8, 8), 0.2),
    "vgg16": ZooCase(2, (3, 32, 32), 0.2),
    "char-lstm": ZooCase(2, (6,), 50.0, rate=20.0),
    "har-transformer": ZooCase(4, (20, 6), 5.0),
}


class Torch:
    """The reference."""

    def __init__(self, model: nn.Module, optimizer: str, rate: float) -> None:
        self.model, self.optimizer = model, torch_optimizer(optimizer, model, rate)
        self.norms: list[float] = []

    def step(self, x: torch.Tensor, y: torch.Tensor, adjustment: Adjustment = NONE) -> float:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        for name, parameter in self.model.named_parameters():
            parameter.grad += adjustment.mu * parameter.detach()
            if adjustment.h is not None and name in adjustment.h:
                parameter.grad += torch.from_numpy(adjustment.h[name])
        if math.isfinite(adjustment.max_norm):
            self.norms.append(nn.utils.clip_grad_norm_(self.model.parameters(), adjustment.max_norm).item())
        self.optimizer.step()
        return loss.item()

    def values(self) -> Changes:
        """The weights, in double precision."""
        return {name: parameter.detach().double().numpy().copy() for name, parameter in self.model.named_parameters()}

    def in_double(self, seed: int | None = None) -> Torch:
        """A copy in double precision, from weights that are changed by rounding errors if there is a seed."""
        other = copy.deepcopy(self)
        other.model.double()
        for state in other.optimizer.state.values():
            state.update({key: value.double() for key, value in state.items() if isinstance(value, torch.Tensor)})
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in other.model.parameters():
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_((parameter * (1 + _ROUNDING * noise)).float())
        return other

    def state_for(self, engine: Engine, bundle: Bundle) -> dict[str, np.ndarray]:
        """What an engine restores to go on from here."""
        trained, named = bundle.manifest.layout.with_role("shared", "personal"), dict(self.model.named_parameters())
        parameters = [named[tensor.name] for tensor in trained]
        vectors = {"weights": [parameter.detach() for parameter in parameters]}
        constants, kept = bundle.manifest.optimizer, engine.state()
        states = [self.optimizer.state[parameter] for parameter in parameters]
        for theirs, ours in (("momentum", "momentum_buffer"), ("moment1", "exp_avg"), ("moment2", "exp_avg_sq")):
            if theirs in kept:
                vectors[theirs] = [s.get(ours, torch.zeros_like(p)) for s, p in zip(states, parameters, strict=True)]
        found = {name: np.concatenate([piece.numpy().ravel() for piece in pieces]) for name, pieces in vectors.items()}
        if constants["name"] == "adamw":
            found["steps"] = np.array(max(float(state.get("step", 0)) for state in states), np.float32)
            if engine.name == "ort-training":  # it keeps the moments without their factor
                for name, beta in zip(("moment1", "moment2"), constants["betas"], strict=True):
                    found[name] /= np.float32(1 - beta)
        return found


def to_torch(x: np.ndarray) -> torch.Tensor:
    """Raw inputs as the exported graph takes them to the model."""
    return torch.from_numpy(x).float() / 255 if x.dtype == np.uint8 else torch.from_numpy(x)


def zoo_model(name: str) -> nn.Module:
    """The model of a case, always with the same weights."""
    torch.manual_seed(0)
    entry, case = ZOO[name], ZOO_CASES[name]
    return entry.factory(classes=entry.classes, input_shape=case.shape, gamma=0.0, **NARROW.get(name, {}))


def zoo_batches(name: str, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Random batches of raw inputs and labels."""
    entry, case, generator = ZOO[name], ZOO_CASES[name], np.random.default_rng(0)
    shape = (case.rows, *case.shape)
    for _ in range(count):
        if entry.input_dtype == "float32":
            x = generator.standard_normal(shape, np.float32)
        else:
            x = generator.integers(0, 256 if entry.input_dtype == "uint8" else entry.classes, shape)
        labels = shape if entry.input_dtype == "int64" else case.rows
        yield x.astype(entry.input_dtype), generator.integers(0, entry.classes, labels)


ZooBundle = Callable[[str, str], Bundle]
"""The bundle of a `zoo_model` and an optimizer."""


def zoo_bundles(folder: Path) -> ZooBundle:
    """Bundles that are made once each; those of a model share the export of its forward pass."""
    graphs: dict[str, Any] = {}
    make_graph = exporter.forward_graph

    @functools.cache
    def export(name: str, optimizer: str) -> Bundle:
        def shared(*arguments: Any, **more: Any) -> Any:
            if name not in graphs:
                graphs[name] = make_graph(*arguments, **more)
            return graphs[name]

        entry = ZOO[name]
        options = ExportConfig(
            name=name,
            input_shape=ZOO_CASES[name].shape,
            input_dtype=entry.input_dtype,
            tokens=entry.classes if entry.input_dtype == "int64" else None,
            **OPTIONS[optimizer],
        )
        with without_verification(), pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(exporter, "forward_graph", shared)
            return export_bundle(zoo_model(name), folder / f"{name}-{optimizer}", options)[0]

    return export


def step_error(found: Changes, expected: Changes) -> float:
    """The largest relative error of the change of any tensor, in the Frobenius norm.

    A change that is nearly zero is compared on the scale of 1e-3 times that of all tensors together.
    """
    sizes = {name: norm(change) for name, change in expected.items()}
    floor = _NEGLIGIBLE * math.hypot(*sizes.values())
    return max(norm(found[name] - change) / max(sizes[name], floor) for name, change in expected.items())


class Rounding:
    """What rounding makes of a step, found in double precision between weights in single precision.

    Args:
        reference: torch before the step.
        x: inputs of the step.
        y: labels.
    """

    def __init__(self, reference: Torch, x: torch.Tensor, y: torch.Tensor) -> None:
        self._reference, self._x, self._y = reference, x.double() if x.is_floating_point() else x, y
        self._changes: dict[int | None, Changes] = {}

    def explains(self, found: Changes, tolerance: float) -> bool:
        """Whether a step that is not torch's in single precision may be due to rounding.

        That is so if it is torch's in double precision, or if that one moves nearly as much when the weights change by
        rounding errors: then a ReLU falls on the other side, or AdamW divides what is nearly zero by its own size.
        """
        expected = self._change(None)
        error = step_error(found, expected)
        return error <= tolerance or any(
            error <= _LIKENESS * step_error(self._change(seed), expected) for seed in range(_PERTURBATIONS)
        )

    def _change(self, seed: int | None) -> Changes:
        if seed not in self._changes:
            double = self._reference.in_double(seed)
            before = double.values()
            double.step(self._x, self._y)
            after = double.values()
            self._changes[seed] = {name: value.astype(np.float32) - before[name] for name, value in after.items()}
        return self._changes[seed]
