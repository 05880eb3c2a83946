"""What the exporter checks of its own work: the written files train what the PyTorch model trains.

The reference is torch in double precision, so that what is measured is the artifacts' own error. Dropout can't be
compared draw by draw: it is switched off on both sides (ratio 0 in the training model).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime import SessionOptions
from onnxruntime.training.api import CheckpointState, Module, Optimizer
from torch.nn import functional as F

from export.artifacts import naming_operators
from export.graph import ForwardGraph
from export.preprocess import Deployed
from fedpara_edge.bundle import Loss
from fedpara_edge.errors import FedparaError, InputError
from fedpara_edge.layout import TensorSpec

TOLERANCE = 1e-5
STEP = 0.01
_NEGLIGIBLE = 1e-4


@dataclass(frozen=True)
class Verification:
    """Relative errors of the artifacts against torch in double precision; all at most `TOLERANCE`.

    `gradient` and `step` are the largest over the parameters, of the Frobenius norm; a gradient that is (nearly) zero
    is compared on the scale of 1e-4 times the norm of all gradients together.
    """

    loss: float
    gradient: float
    outputs: float
    step: float


def verify_artifacts(
    folder: Path,
    graph: ForwardGraph,
    model: Deployed,
    *,
    tensors: Sequence[TensorSpec],
    loss: Loss,
    optimizer: Mapping[str, Any],
    batch: tuple[torch.Tensor, torch.Tensor],
) -> Verification:
    """Load the artifacts, take a training step, an evaluation and an optimizer step, and compare each with torch.

    Args:
        folder: the artifacts.
        graph: the forward graph they were made from.
        model: the PyTorch model they stand for, with the same parameters.
        tensors: the trained tensors.
        loss: of the artifacts.
        optimizer: its constants.
        batch: raw inputs [B, ...] and labels [B, ...].

    Raises:
        FedparaError: a parameter is missing, folded or misshapen, or a result differs by more than `TOLERANCE`.
    """
    _check_parameters(folder, graph, tensors)
    x, y = batch
    arrays = [x.numpy(), y.numpy()]
    expected = _reference(model, x, y, loss)
    with tempfile.TemporaryDirectory() as scratch:
        training_model = Path(scratch) / "training_model.onnx"
        _without_dropout(folder / "training_model.onnx", training_model)
        state = CheckpointState.load_checkpoint(folder / "checkpoint")
        quiet = SessionOptions()
        quiet.log_severity_level = 3
        with naming_operators(graph):
            module = Module(training_model, state, folder / "eval_model.onnx", session_options=quiet)
        module.eval()
        _, outputs = module(*arrays)
        module.train()
        found_loss, _ = module(*arrays)
        gradients = {tensor.name: np.array(state.parameters[tensor.name].grad) for tensor in tensors}
        optimizing = Optimizer(folder / "optimizer_model.onnx", module)
        optimizing.set_learning_rate(STEP)
        optimizing.step()
        stepped = {tensor.name: np.array(state.parameters[tensor.name].data) for tensor in tensors}
    total = float(np.sqrt(sum(np.sum(g**2) for g in expected.gradients.values())))
    gradient_errors = {
        name: _relative(gradients[name], g, floor=_NEGLIGIBLE * total) for name, g in expected.gradients.items()
    }
    step_errors = {
        name: _relative(stepped[name], _stepped(expected.weights[name], gradients[name], optimizer))
        for name in expected.gradients
    }
    worst_gradient = max(gradient_errors, key=lambda name: gradient_errors[name])
    worst_step = max(step_errors, key=lambda name: step_errors[name])
    verification = Verification(
        loss=_relative(np.array(found_loss), np.array(expected.loss)),
        gradient=gradient_errors[worst_gradient],
        outputs=_relative(outputs, expected.outputs),
        step=step_errors[worst_step],
    )
    for what, error in (
        ("loss of the training model", verification.loss),
        ("outputs of the eval model", verification.outputs),
        (f"gradient of {worst_gradient!r}", verification.gradient),
        (f"{optimizer['name']} step of {worst_step!r}", verification.step),
    ):
        if not error <= TOLERANCE:
            raise FedparaError(
                f"{what}: expected torch's within {TOLERANCE:g} relative, found {error:.2g}; nothing was written: "
                "please report this model"
            )
    return verification


@dataclass(frozen=True)
class _Reference:
    loss: float
    outputs: NDArray[Any]
    gradients: dict[str, NDArray[Any]]
    weights: dict[str, NDArray[Any]]


def _reference(model: Deployed, x: torch.Tensor, y: torch.Tensor, loss: Loss) -> _Reference:
    double = copy.deepcopy(model).double().eval()
    double.dtype = torch.float64
    outputs = double(x)
    value = LOSS_FUNCTIONS[loss](outputs, y if y.dtype == torch.int64 else y.double())
    names = {name: parameter for name, parameter in double.model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(value, list(names.values()), allow_unused=True)
    unused = [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]
    if unused:
        raise InputError(
            f"parameter {unused[0]!r}: expected to take part in the output, found no gradient; "
            "remove it or set requires_grad=False"
        )
    return _Reference(
        loss=value.item(),
        outputs=outputs.detach().numpy(),
        gradients={name: g.numpy() for name, g in zip(names, gradients, strict=True) if g is not None},
        weights={name: parameter.detach().numpy() for name, parameter in names.items()},
    )


LOSS_FUNCTIONS: dict[Loss, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "mse": F.mse_loss,
    "bce": F.binary_cross_entropy_with_logits,
}


def _stepped(weight: NDArray[Any], gradient: NDArray[Any], optimizer: Mapping[str, Any]) -> NDArray[Any]:
    """One step of torch's optimizer from the artifacts' own gradient, in double precision.

    From its own gradient, because AdamW divides a gradient by its size: near zero that amplifies a rounding error.
    """
    parameter = torch.nn.Parameter(torch.from_numpy(weight.copy()))
    parameter.grad = torch.from_numpy(gradient.astype(np.float64))
    if optimizer["name"] == "sgd":
        torch.optim.SGD([parameter], lr=STEP).step()
    else:
        constants = {key: value for key, value in optimizer.items() if key != "name"}
        torch.optim.AdamW([parameter], lr=STEP, **constants).step()
    return parameter.detach().numpy()


def _check_parameters(folder: Path, graph: ForwardGraph, tensors: Sequence[TensorSpec]) -> None:
    initializers = {tensor.name: tuple(tensor.dims) for tensor in graph.model.graph.initializer}
    used = {name for node in graph.model.graph.node for name in node.input}
    training = {i.name for i in onnx.load(folder / "training_model.onnx").graph.input}
    for tensor in tensors:
        if initializers.get(tensor.name) != tensor.shape or not {tensor.name} <= used & training:
            raise FedparaError(
                f"parameter {tensor.name!r}: expected to be trained in the graph with shape {list(tensor.shape)}, "
                f"found {initializers.get(tensor.name, 'it folded away')}; nothing was written"
            )


def _without_dropout(source: Path, target: Path) -> None:
    """Copy a training model with the ratio of every dropout set to zero."""
    model = onnx.load(source)
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.0, np.float32), "verify.ratio"))
    for node in model.graph.node:
        ratio = {"Dropout": 1, "BiasDropout": 3, "DropoutGrad": 2}.get(node.op_type)
        if ratio is not None and len(node.input) > ratio:
            node.input[ratio] = "verify.ratio"
    onnx.save(model, target)


def _relative(found: NDArray[Any], expected: NDArray[Any], *, floor: float = 0.0) -> float:
    difference = float(np.linalg.norm(np.ravel(found).astype(np.float64) - np.ravel(expected)))
    return difference / max(float(np.linalg.norm(expected)), floor, 1e-30)
