"""Gradients of nodes as other exporters than torch's write them, in the engine onnxruntime."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from step_models import run_step, write_rows
from torch.nn import functional as F

from export.forward.outputs import OUTPUT

SIZE = 6


def write(folder: Path, *nodes: onnx.NodeProto, shape: tuple[int, ...], entries: int) -> None:
    """Write the steps of nodes from `scaled`, which is x · weight, to `result`, whose rows are the outputs."""
    forward = [
        helper.make_node("Mul", ["x", "weight"], ["scaled"], name="scale"),
        *nodes,
        helper.make_node("Reshape", ["result", "rows"], [OUTPUT], name="rows"),
    ]
    arrays = {"weight": np.ones((1, *shape), np.float32), "rows": np.array([-1, entries])}
    write_rows(forward, arrays, ["weight"], entries, folder, np.ones((3, *shape), np.float32))


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize(
    ("options", "around"),
    [
        ({"auto_pad": "SAME_UPPER", "strides": 2}, (0, 1)),
        ({"auto_pad": "SAME_LOWER", "strides": 2}, (1, 0)),
        ({"auto_pad": "SAME_LOWER", "strides": 1}, (1, 1)),
        ({"auto_pad": "VALID", "strides": 2}, (0, 0)),
        ({"storage_order": 1, "strides": 1}, (0, 0)),
    ],
)
def test_max_pool_in_all_its_forms(axes: int, options: dict[str, Any], around: tuple[int, int], tmp_path: Path) -> None:
    shape, kernel = (2, *[SIZE] * axes), [3] * axes
    generator = np.random.default_rng(0)
    x = generator.standard_normal((4, *shape), dtype=np.float32)
    scale = torch.ones(1, *shape, dtype=torch.float64, requires_grad=True)
    filled = F.pad(torch.from_numpy(x).double() * scale, around * axes, value=-np.inf)
    expected = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[axes - 1](filled, 3, options["strides"]).flatten(1)
    y = generator.standard_normal(expected.shape, dtype=np.float32)
    F.mse_loss(expected, torch.from_numpy(y).double()).backward()
    given = {**options, "strides": [options["strides"]] * axes, "kernel_shape": kernel}
    outputs = ["result", "places"] if "storage_order" in options else ["result"]
    node = helper.make_node("MaxPool", ["scaled"], outputs, name="pool", **given)
    write(tmp_path, node, shape=shape, entries=y.shape[1])
    found = run_step(tmp_path / "train_step.onnx", x, y, weights=np.ones(x[0].size, np.float32))["gradient"]
    np.testing.assert_allclose(found, scale.grad.numpy().ravel(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(2, 6, 8), (2, 5, 7), (2, 2, 2)])
@pytest.mark.parametrize("options", [{}, {"ceil_mode": 1}, {"pads": [1, 0, 0, 1]}])
def test_of_equal_entries_the_first_takes_the_gradient(
    shape: tuple[int, ...], options: dict[str, Any], tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    x = generator.integers(-1, 2, (4, *shape)).astype(np.float32)
    scale = torch.ones(1, *shape, dtype=torch.float64, requires_grad=True)
    top, left, bottom, right = options.get("pads", [0] * 4)
    filled = F.pad(torch.from_numpy(x).double() + scale - 1, (left, right, top, bottom), value=-np.inf)
    expected = F.max_pool2d(filled, 2, ceil_mode="ceil_mode" in options).flatten(1)
    y = generator.standard_normal(expected.shape, dtype=np.float32)
    F.mse_loss(expected, torch.from_numpy(y).double()).backward()
    add = helper.make_node("Add", ["x", "weight"], ["scaled"], name="add")
    node = helper.make_node("MaxPool", ["scaled"], ["result"], name="p", kernel_shape=[2, 2], strides=[2, 2], **options)
    rows = helper.make_node("Reshape", ["result", "rows"], [OUTPUT], name="rows")
    entries = y.shape[1]
    arrays = {"weight": np.zeros((1, *shape), np.float32), "rows": np.array([-1, entries])}
    write_rows([add, node, rows], arrays, ["weight"], entries, tmp_path, np.ones((3, *shape), np.float32))
    found = run_step(tmp_path / "train_step.onnx", x, y, weights=np.zeros(x[0].size, np.float32))["gradient"]
    np.testing.assert_allclose(found, scale.grad.numpy().ravel(), rtol=1e-5, atol=1e-7)


def test_a_dropout_without_ratio_drops_half(tmp_path: Path) -> None:
    train = helper.make_node("Constant", [], ["train"], name="train", value=numpy_helper.from_array(np.array(True)))
    node = helper.make_node("Dropout", ["scaled", "", "train"], ["result"], name="dropout")
    write(tmp_path, train, node, shape=(1000,), entries=1000)
    x, y = np.ones((1, 1000), np.float32), np.zeros((1, 1000), np.float32)
    gradient = run_step(tmp_path / "train_step.onnx", x, y, weights=np.ones(1000, np.float32))["gradient"] * 1000
    assert abs((gradient > 0).mean() - 0.5) < 0.07  # four standard deviations
    np.testing.assert_allclose(gradient[gradient > 0], 2 / 0.5**2, rtol=1e-5)


def test_a_dropout_without_mode_drops_nothing(tmp_path: Path) -> None:
    node = helper.make_node("Dropout", ["scaled"], ["result"], name="dropout")
    write(tmp_path, node, shape=(50,), entries=50)
    x, y = np.ones((1, 50), np.float32), np.zeros((1, 50), np.float32)
    gradient = run_step(tmp_path / "train_step.onnx", x, y, weights=np.ones(50, np.float32))["gradient"]
    np.testing.assert_allclose(gradient, 2 / 50, rtol=1e-6)


@pytest.mark.parametrize("bound", [6.0, 4.0, 0.0, -1.0, -0.3, 1e-30, 1e30])
@pytest.mark.parametrize("upper", [False, True])
def test_a_bound_of_clip_belongs_to_what_it_clips(bound: float, upper: bool, tmp_path: Path) -> None:
    limit, far = np.float32(bound), np.float32(np.inf)
    entries = np.array([np.nextafter(limit, -far), limit, np.nextafter(limit, far), -4 * abs(bound) - 1, 4 * bound + 1])
    values = entries.astype(np.float32)
    constant = helper.make_node("Constant", [], ["bound"], name="bound", value=numpy_helper.from_array(limit))
    node = helper.make_node("Clip", ["scaled", *(["", "bound"] if upper else ["bound"])], ["result"], name="clip")
    write(tmp_path, constant, node, shape=(5,), entries=5)
    clipped = np.minimum(values, limit) if upper else np.maximum(values, limit)
    x, y = np.ones((1, 5), np.float32), clipped[None] / 2 - 1  # no entry is at its label
    found = run_step(tmp_path / "train_step.onnx", x, y, weights=values)["gradient"]
    np.testing.assert_array_equal(found != 0, values <= limit if upper else values >= limit)
