"""Verification of models that don't take every random row: where torch has no finite results, files need none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from export import export_bundle
from export.folding.fold import fold
from fedpara_edge.errors import FedparaError, InputError
from fedpara_edge.formats.bundle import WEIGHTS
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.formats.weights import read_weights


class Roots(nn.Module):
    """A network on rows [4, 3] times the roots of their first numbers, which must not be negative."""

    def __init__(self, roots: int = 12) -> None:
        super().__init__()
        self.roots, self.hidden, self.head = roots, nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        features = x * x[:, : self.roots].sqrt().sum(1, keepdim=True)
        logits: torch.Tensor = self.head(torch.relu(self.hidden(features)))
        return logits


class Large(Roots):
    """A network whose features double precision can hold, and float32 can't."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = torch.log((100 + x).exp()).flatten(1)
        logits: torch.Tensor = self.head(torch.relu(self.hidden(features)))
        return logits


def options(**more: Any) -> ExportConfig:
    common: dict[str, Any] = {
        "name": "test",
        "input_shape": (4, 3),
        "input_dtype": "float32",
        "engines": ("onnxruntime",),
    }
    return ExportConfig(**common, **more)


def test_a_model_that_takes_no_random_row_is_not_blamed_on_us(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"finite .* from torch, found NaN or Inf on every batch; .*--example"
    ) as error:
        export_bundle(Roots(), tmp_path / "bundle", options())
    assert "report" not in str(error.value)
    assert not any(tmp_path.iterdir())


def test_it_is_verified_on_rows_that_it_takes(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).random((20, 4, 3), np.float32)
    _, verification = export_bundle(Roots(), tmp_path / "bundle", options(), examples={"x": rows})
    assert verification["onnxruntime"].worst < 1e-5


def test_rows_that_torch_does_not_take_are_passed_over(tmp_path: Path) -> None:
    """Every second one is; larger batches are made of two that are not."""
    torch.manual_seed(0)
    _, verification = export_bundle(Roots(roots=1), tmp_path / "bundle", options())
    assert verification["onnxruntime"].worst < 1e-5


def test_what_float32_can_not_hold_is_said(tmp_path: Path) -> None:
    with pytest.raises(FedparaError, match="from torch in float32, found NaN or Inf on every batch"):
        export_bundle(Large(), tmp_path / "bundle", options())


def test_folding_says_that_random_rows_may_be_to_blame(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).random((20, 4, 3), np.float32)
    bundle = export_bundle(Roots(), tmp_path / "bundle", options(), examples={"x": rows})[0]
    with pytest.raises(FedparaError, match=r"don't take random rows; .* fold with --data"):
        fold(bundle, read_weights(bundle.file(WEIGHTS)), tmp_path / "model.onnx")
