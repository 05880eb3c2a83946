"""Laws of the gradient of a convolution of few channels: torch's, by its patches, and only where these are few."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path

import onnx
import pytest
import torch
from norms import relative_error
from onnx import helper
from step_models import batch, export, gradient_of, net, run
from torch import nn

from export.forward.tracing import Batch, Trace
from export.gradients import Graph, patches
from export.gradients.geometry import Convolution

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "image": (lambda: nn.Conv2d(3, 7, 3, padding=1), (3, 9, 8)),
    "one channel": (lambda: nn.Conv2d(1, 4, 5), (1, 9, 8)),
    "strided": (lambda: nn.Conv2d(2, 4, 3, stride=2, padding=(0, 1)), (2, 9, 8)),
    "pixels that no filter reaches": (lambda: nn.Conv2d(2, 4, 2, stride=3), (2, 10, 9)),
    "dilated": (lambda: nn.Conv2d(3, 4, 3, dilation=2, padding=2, bias=False), (3, 7, 8)),
    "same": (lambda: nn.Conv2d(2, 4, (1, 3), padding="same"), (2, 7, 8)),
    "pixelwise": (lambda: nn.Conv2d(8, 4, 1, stride=2), (8, 6, 5)),
    "signal": (lambda: nn.Conv1d(3, 8, 5, padding=2), (3, 20)),
    "volume": (lambda: nn.Conv3d(1, 4, (2, 3, 3), padding=(1, 0, 1)), (1, 4, 5, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(5, 2, 3, stride=2, padding=1, output_padding=1), (5, 4, 5)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_are_those_of_torch(layer: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    model = net(make(), nn.Tanh(), shape=shape)
    bundle = export(model, tmp_path, shape)
    for rows in (1, 5):
        x, y = batch(shape, rows)
        assert relative_error(run(bundle, x, y)["gradient"], gradient_of(model.float(), x, y)) < 1e-5
    graph = onnx.load(bundle.file("train_step.onnx")).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    (pick,) = (constants[node.input[1]] for node in graph.node if node.op_type == "Conv" and node.input[1] in constants)
    assert pick.dims[0] == prod(pick.dims[1:]) <= patches.MOST_ENTRIES


@pytest.mark.parametrize(
    ("shape", "kernel", "groups", "expected"),
    [
        ((3, 32, 32), 3, 1, True),
        ((3, 34, 33), 3, 1, False),
        ((4, 32, 32), 3, 1, False),
        ((32, 8, 8), 1, 1, True),
        ((4, 8, 8), 3, 2, False),
    ],
)
def test_patches_are_copied_only_where_they_are_few(
    shape: tuple[int, ...], kernel: int, groups: int, expected: bool
) -> None:
    weight = (8, shape[0] // groups, kernel, kernel)
    out = (8, *shape[1:])
    graph = Graph(Trace({"x": (Batch(), *shape), "w": weight, "y": (Batch(), *out)}, {}, {}))
    node = helper.make_node("Conv", ["x", "w"], ["y"], kernel_shape=[kernel] * 2, pads=[kernel // 2] * 4, group=groups)
    facts = Convolution.from_conv(graph, node)
    assert patches.applies(facts) == expected
    assert (
        prod(weight[1:]) <= patches.MOST_ENTRIES and prod(out[1:]) <= patches.MOST_PIXELS and groups == 1
    ) == expected
