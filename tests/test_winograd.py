"""Laws of convolutions by Winograd's minimal filtering: gradients as in torch, and weights that are not transposed."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from norms import relative_error
from step_models import Twice, batch, export, gradient_of, net, run
from torch import nn

from device_runtime.engines.ort import InferenceSession, session_options
from fedpara_edge.nn import Conv2d

IMAGE = (32, 6, 5)
"""Shape with an odd size, of which tiles of 2 x 2 overlap the edge."""


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: nn.Conv2d(32, 33, 3, padding=1),
    "no padding": lambda: nn.Conv2d(32, 33, 3, padding=(0, 1), bias=False),
    "much padding": lambda: nn.Conv2d(32, 33, 3, padding=(3, 0)),
    "same": lambda: nn.Conv2d(32, 33, 3, padding="same"),
    "fedpara, tensor": lambda: Conv2d(32, 33, 3, padding=1, rank=3, form="tensor"),
    "fedpara, matrix": lambda: Conv2d(32, 33, 3, padding=1, rank=5, form="matrix"),
    "fedpara, tanh": lambda: Conv2d(32, 33, 3, padding=1, rank=3, form="tensor", tanh=True),
    "pfedpara": lambda: Conv2d(32, 33, 3, padding=1, rank=3, form="tensor", kind="pfedpara"),
    "low-rank": lambda: Conv2d(32, 33, 3, padding=1, rank=4, form="tensor", kind="lowrank"),
    "update": lambda: Conv2d(32, 33, 3, padding=1, rank=4, form="matrix", kind="update"),
    "twice": Twice,
}


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_are_those_of_torch(layer: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = net(LAYERS[layer](), nn.Tanh(), shape=IMAGE)
    bundle = export(model, tmp_path, IMAGE)
    held = {name: model.get_buffer(name).numpy() for name, _ in model.named_buffers()}
    for rows in (1, 5):
        x, y = batch(IMAGE, rows)
        found = run(bundle, x, y, **held)
        assert relative_error(found["gradient"], gradient_of(model.float(), x, y)) < 1e-5
    operators = Counter(node.op_type for node in onnx.load(bundle.file("train_step.onnx")).graph.node)
    assert not operators["Conv"] + operators["ConvTranspose"]


def test_composed_weights_are_not_transposed(tmp_path: Path) -> None:
    bundle = export(net(LAYERS["fedpara, tensor"](), shape=IMAGE), tmp_path, IMAGE)
    options = session_options(1)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    InferenceSession(bundle.file("train_step.onnx"), options, providers=["CPUExecutionProvider"])
    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "optimized.onnx"), data_prop=True)
    weights = (9 * 32 * 33, 16 * 32 * 33)
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in model.graph.value_info
    }
    moved = [shapes.get(node.output[0]) for node in model.graph.node if node.op_type == "Transpose"]
    assert moved
    assert [shape for shape in moved if shape and np.prod(shape) in weights] == []


def test_matrices_of_tiles_are_made_when_the_graph_is_loaded(tmp_path: Path) -> None:
    bundle = export(net(LAYERS["dense"](), shape=IMAGE), tmp_path, IMAGE)
    options = session_options(1)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    InferenceSession(bundle.file("train_step.onnx"), options, providers=["CPUExecutionProvider"])
    tiles, pixels = 3 * 3, 6 * 5
    sizes = {
        name: [np.prod(tensor.dims) for tensor in onnx.load(path).graph.initializer]
        for name, path in (("file", bundle.file("train_step.onnx")), ("loaded", tmp_path / "optimized.onnx"))
    }
    assert max(sizes["file"]) <= 16 * tiles
    assert sizes["loaded"].count(16 * tiles * pixels) == 4  # B in both passes, A and its transpose


@pytest.mark.slow
def test_layers_on_large_images_are_convolutions(tmp_path: Path) -> None:
    bundle = export(net(nn.Conv2d(2, 32, 3), nn.Conv2d(32, 32, 3), shape=(2, 12, 12)), tmp_path, (2, 12, 12))
    operators = Counter(node.op_type for node in onnx.load(bundle.file("train_step.onnx")).graph.node)
    assert operators["Conv"] > 2
