"""What can not be folded is refused, and nothing is written."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from folded import initial_weights, quick_export
from onnx import numpy_helper
from torch import nn

from export.folding.composing import compose_layers
from export.folding.fold import fold
from export.folding.ranges import Ranges
from fedpara_edge.errors import FedparaError, InputError, WrongBundleError
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.weights import Weights
from fedpara_edge.nn import Linear


@pytest.fixture(scope="module")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of one small layer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("small") / "bundle"
    return quick_export(nn.Sequential(Linear(12, 5, rank=2)), folder, (12,), "onnxruntime")


@pytest.fixture
def small(small_bundle: Bundle, tmp_path: Path) -> Iterator[tuple[Bundle, Weights]]:
    """The small bundle and its weights; whatever happens, nothing is written to `tmp_path`."""
    yield small_bundle, initial_weights(small_bundle)
    assert list(tmp_path.iterdir()) == []


Small = tuple[Bundle, Weights]


def scaled(weights: Weights, by: float) -> Weights:
    tensors = {name: np.asarray(by * value, np.float32) for name, value in weights.tensors.items()}
    return Weights(weights.fingerprint, weights.round, weights.layout, tensors)


def test_a_wrong_graph_is_refused(small: Small, tmp_path: Path) -> None:
    def moved(*arguments: Any) -> Any:
        composed = compose_layers(*arguments)
        (bias,) = [tensor for tensor in composed.model.graph.initializer if tensor.name.endswith("bias")]
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 0.01, bias.name))
        return composed

    with (
        patch("export.folding.fold.compose_layers", moved),
        pytest.raises(
            FedparaError, match=r"factored model's outputs within 0.0001 relative, found 0\.\d+; nothing was"
        ),
    ):
        fold(*small, tmp_path / "model.onnx")


def test_a_float16_that_is_not_finite_is_refused(small: Small, tmp_path: Path) -> None:
    bundle, weights = small
    with (
        patch("export.folding.fold.find_ranges", lambda *_: Ranges()),
        pytest.raises(FedparaError, match="expected finite outputs in float16, found NaN or Inf; nothing was written"),
    ):
        fold(bundle, scaled(weights, 1e3), tmp_path / "model.onnx", precision="float16")


def test_diverged_weights_are_refused(small: Small, tmp_path: Path) -> None:
    bundle, weights = small
    with pytest.raises(FedparaError, match="expected finite outputs, found NaN or Inf: these weights diverged"):
        fold(bundle, scaled(weights, 1e15), tmp_path / "model.onnx")


def test_weights_of_another_bundle_are_refused(small: Small, tmp_path: Path) -> None:
    bundle, weights = small
    with pytest.raises(WrongBundleError, match=r"expected weights of bundle \w+…, found those of fff"):
        fold(bundle, Weights("f" * 64, 0, weights.layout, weights.tensors), tmp_path / "model.onnx")


@pytest.mark.parametrize("max_drop", [-1.0, 101.0, float("nan")])
def test_impossible_drop_is_refused(max_drop: float, small: Small, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="max_drop: expected points of accuracy from 0 to 100"):
        fold(*small, tmp_path / "model.onnx", max_drop=max_drop)


def test_existing_output_is_kept_unless_overwritten(small_bundle: Bundle, tmp_path: Path) -> None:
    path, weights = tmp_path / "model.onnx", initial_weights(small_bundle)
    path.write_text("mine")
    with pytest.raises(InputError, match="--overwrite"):
        fold(small_bundle, weights, path)
    assert path.read_text() == "mine"
    first = fold(small_bundle, weights, path, overwrite=True)
    content = path.read_bytes()
    assert fold(small_bundle, weights, path, overwrite=True) == first
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
