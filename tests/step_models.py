"""Small models, exported to a plain training step, and what that step and torch make of a batch."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession
from torch import nn
from torch.nn import functional as F

from export import export_bundle
from export.comparison import TOLERANCE
from export.forward.graph import INPUT, IR_VERSION, LABEL, OPSET, ForwardGraph
from export.forward.outputs import OUTPUT
from export.step.training_step import StepSpec, write_steps
from export.step.weight_update import optimizer_constants
from fedpara_edge.factors.layout import TensorSpec
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.interface import ArraySpec, Head
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.formats.weights import read_weights
from fedpara_edge.losses import find_loss
from fedpara_edge.nn import Conv2d

IMAGE, SEQUENCE, VECTOR, VOLUME = (2, 11, 12), (3, 10), (12,), (2, 4, 6, 5)


class Formula(nn.Module):
    """A linear layer, a formula in torch, and a linear layer."""

    def __init__(self, formula: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.formula = nn.Linear(12, 12), formula
        self.last = nn.LazyLinear(5)
        self(torch.zeros(2, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.formula(self.first(x)).flatten(1))


class Twice(nn.Module):
    """A convolution that is called twice, and composes its weight each time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = Conv2d(32, 32, 3, padding=1, rank=3, form="tensor")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.conv(x).tanh())


def net(*layers: nn.Module, shape: tuple[int, ...] = IMAGE) -> nn.Sequential:
    model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(5))
    model(torch.zeros(2, *shape))
    return model


def export(
    model: nn.Module,
    folder: Path,
    shape: tuple[int, ...],
    optimizer: str = "sgd",
    engines: tuple[str, ...] = ("onnxruntime",),
    **constants: float,
) -> Bundle:
    options = ExportConfig(
        name="test",
        input_shape=shape,
        input_dtype="float32",
        optimizer=optimizer,
        **constants,
        engines=engines,
    )
    bundle, verification = export_bundle(model, folder / "bundle", options)
    assert max(verified.worst for verified in verification.values()) <= TOLERANCE
    return bundle


def weights_of(bundle: Bundle) -> np.ndarray:
    tensors = {**read_weights(bundle.file("weights.safetensors")).tensors, **bundle.read_initial_personal()}
    return np.concatenate([tensors[t.name].ravel() for t in bundle.manifest.layout.with_role("shared", "personal")])


def run(bundle: Bundle, x: np.ndarray, y: np.ndarray, **changed: object) -> dict[str, np.ndarray]:
    return run_step(bundle.file("train_step.onnx"), x, y, **{"weights": weights_of(bundle), **changed})


def run_step(path: Path, x: np.ndarray, y: np.ndarray, **changed: object) -> dict[str, np.ndarray]:
    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    none = np.zeros(1, np.float32)
    values = {
        "x": x,
        "y": y,
        "seed": np.int64(0),
        "accumulated": none,
        "share": np.float32(1),
        "last": np.array(True),
        "learning_rate": np.float32(0.1),
        "adjusted": np.array(False),
        "mu": none,
        "h": none,
        "max_norm": np.float32(np.inf),
        **changed,
    }
    feed = {entry.name: np.asarray(values[entry.name]) for entry in session.get_inputs()}
    return dict(zip([entry.name for entry in session.get_outputs()], session.run(None, feed), strict=True))


def batch(shape: tuple[int, ...], size: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(size)
    return generator.standard_normal((size, *shape), dtype=np.float32), generator.integers(0, 5, size)


def gradient_of(model: nn.Module, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    model.double().zero_grad()
    F.cross_entropy(model(torch.from_numpy(x).double()), torch.from_numpy(y)).backward()
    return np.concatenate([parameter.grad.numpy().ravel() for parameter in model.parameters()])


def write_rows(
    nodes: Sequence[onnx.NodeProto],
    arrays: Mapping[str, np.ndarray],
    trained: Sequence[str],
    entries: int,
    folder: Path,
    example: np.ndarray,
) -> None:
    """Write the steps of a graph from x to rows of outputs, with the squared error as the loss.

    Its arrays are initializers; its nodes are those of a module named like the node.
    """
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank)
        for name, rank in ((INPUT, example.ndim), (OUTPUT, 2))
    ]
    initializers = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "forward", ends[:1], ends[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    tensors = [
        TensorSpec(name=name, shape=arrays[name].shape, dtype="float32", layer="", part="other", role="shared")
        for name in trained
    ]
    rows = [ArraySpec(name, (entries,), "float32") for name in (OUTPUT, LABEL)]
    spec = StepSpec(tensors, (Head(*rows, find_loss("mse")),), optimizer_constants("sgd"))
    modules = {node.name: node.name for node in nodes}
    write_steps(ForwardGraph(model, modules, {OUTPUT: (entries,)}), folder, spec, {INPUT: example})
