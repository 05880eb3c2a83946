"""A small network with all that an engine must cope with, as a bundle, with data and torch's optimizers for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from export import export_bundle, exporter
from export.step.weight_update import optimizer_constants
from fedpara_edge.factors.rank import UpdateOptions
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.nn import Conv2d, Linear

SHAPE, CLASSES = (1, 8, 8), 5
SmallBundle = Callable[..., Bundle]
"""The fixture `small_bundle`: the small network as a bundle, for an optimizer and with that much dropout."""
Batches = list[tuple[np.ndarray, np.ndarray]]

OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd"},
    "momentum": {"optimizer": "sgd", "momentum": 0.9},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1},
}
OPTIMIZERS = {
    name: optimizer_constants(options["optimizer"], **{key: options[key] for key in options if key != "optimizer"})
    for name, options in OPTIONS.items()
}


def torch_optimizer(name: str, model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """What `OPTIMIZERS` stands for."""
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9 if name == "momentum" else 0.0)


def small_net(*, dropout: float = 0.0) -> nn.Sequential:
    """Shared and personal factors, and nothing that magnifies rounding: no kinks, no maxima."""
    torch.manual_seed(1)
    return nn.Sequential(
        Conv2d(1, 8, 3, rank=2, padding=1),
        nn.GroupNorm(2, 8),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(dropout),
        Linear(128, CLASSES, kind="pfedpara", rank=3),
    )


def updating_net(**options: Any) -> nn.Sequential:
    """The same of kind `update`, without dropout, with these options of its updates."""
    torch.manual_seed(1)
    update = UpdateOptions(**options)
    return nn.Sequential(
        Conv2d(1, 8, 3, kind="update", rank=2, padding=1, update=update),
        nn.GroupNorm(2, 8),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        Linear(128, CLASSES, kind="update", rank=3, update=update),
    )


def export_small_net(folder: Path, optimizer: str = "sgd", *, dropout: float = 0.0) -> Bundle:
    """Export it for both engines. What `test_export` holds is not verified again."""
    options = ExportConfig(name="small", input_shape=SHAPE, input_dtype="float32", **OPTIONS[optimizer])
    with without_verification():
        return export_bundle(small_net(dropout=dropout), folder, options)[0]


@contextmanager
def without_verification() -> Iterator[None]:
    """Export faster."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(exporter, "verify", lambda *_, **__: {})
        yield


def batches(count: int) -> Batches:
    """Batches of 16 and 7 rows in turn."""
    generator = np.random.default_rng(0)
    return [
        (generator.standard_normal((size, *SHAPE), dtype=np.float32), generator.integers(0, CLASSES, size))
        for size in (16, 7) * (count // 2)
    ]
