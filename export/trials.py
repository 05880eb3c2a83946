"""Trials of written files, engine by engine: one batch through training step, evaluation and optimizer step.

Dropout is switched off, as its draws can't be compared with torch's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime import InferenceSession, SessionOptions

from export.forward.graph import ForwardGraph
from export.step.dropout import LIMIT, SCALE
from export.step.weight_update import state_shapes
from fedpara_edge.factors.layout import TensorSpec

Batch = tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]
"""Raw inputs and labels [B, ...] by name, in the order of the graphs."""
STEP = 0.1
"""Learning rate of the optimizer step."""


@dataclass(frozen=True)
class Results:
    """Results of a trial.

    Attributes:
        loss: Loss of the batch.
        outputs: Outputs of the model in evaluation, all of them flattened, one after the other.
        gradients: Gradients by tensor.
        stepped: Weights after an optimizer step, by tensor; None if the files don't take the step.
    """

    loss: float
    outputs: NDArray[Any]
    gradients: dict[str, NDArray[Any]]
    stepped: dict[str, NDArray[Any]] | None


Trial = Callable[[Batch], Results]


def try_ort_training(folder: Path, graph: ForwardGraph, tensors: Sequence[TensorSpec], batch: Batch) -> Results:
    """Try the four artifacts in onnxruntime-training.

    Raises:
        InputError: An operator has no kernel for its gradient.
    """
    from onnxruntime.training.api import CheckpointState, Module, Optimizer

    from export.artifacts import naming_operators

    arrays = [tensor.numpy() for part in batch for tensor in part.values()]
    with tempfile.TemporaryDirectory() as scratch:
        training_model = Path(scratch) / "training_model.onnx"
        _copy_without_dropout(folder / "training_model.onnx", training_model)
        state = CheckpointState.load_checkpoint(folder / "checkpoint")
        with naming_operators(graph):
            module = Module(training_model, state, folder / "eval_model.onnx", session_options=_quiet())
        module.eval()
        _, *outputs = module(*arrays)
        module.train()
        loss, *_ = module(*arrays)
        gradients = {tensor.name: np.array(state.parameters[tensor.name].grad) for tensor in tensors}
        stepped = None
        if (folder / "optimizer_model.onnx").exists():
            optimizer = Optimizer(folder / "optimizer_model.onnx", module)
            optimizer.set_learning_rate(STEP)
            optimizer.step()
            stepped = {tensor.name: np.array(state.parameters[tensor.name].data) for tensor in tensors}
    return Results(float(loss), flattened(outputs), gradients, stepped)


def try_onnxruntime(
    folder: Path,
    tensors: Sequence[TensorSpec],
    weights: Mapping[str, NDArray[Any]],
    optimizer: Mapping[str, Any],
    batch: Batch,
) -> Results:
    """Try the step and the evaluation in standard operators, in onnxruntime."""
    model = onnx.load(folder / "train_step.onnx")
    for tensor in model.graph.initializer:
        off = next((value for suffix, value in _OFF.items() if tensor.name.endswith(suffix)), None)
        if off is not None:
            tensor.CopyFrom(numpy_helper.from_array(off, tensor.name))
    flat = np.concatenate([weights[tensor.name].reshape(-1) for tensor in tensors])
    none = np.zeros(1, np.float32)
    feed = {name: tensor.numpy() for part in batch for name, tensor in part.items()} | {"weights": flat}
    settings: dict[str, NDArray[Any]] = {
        "seed": np.array(0, np.int64),
        "accumulated": none,
        "share": np.array(1, np.float32),
        "last": np.array(True),
        "learning_rate": np.array(STEP, np.float32),
        "adjusted": np.array(False),
        "mu": none,
        "h": none,
        "max_norm": np.array(np.inf, np.float32),
        **{name: np.zeros(shape, np.float32) for name, shape in state_shapes(optimizer, len(flat)).items()},
    }
    step = _session(model.SerializeToString())
    loss, gradient, new = step.run(["loss", "gradient", "new_weights"], feed | settings)
    _, *outputs = _session((folder / "eval_step.onnx").read_bytes()).run(None, feed)
    return Results(float(loss), flattened(outputs), _split(gradient, tensors), _split(new, tensors))


def flattened(outputs: Iterable[NDArray[Any]]) -> NDArray[Any]:
    """Outputs of a model, all flattened, one after the other."""
    return np.concatenate([np.ravel(output) for output in outputs])


_OFF: dict[str, NDArray[Any]] = {LIMIT: np.array(2**32, np.int64), SCALE: np.array(1.0, np.float32)}


def _session(model: bytes) -> InferenceSession:
    return InferenceSession(model, _quiet(), providers=["CPUExecutionProvider"])


def _quiet() -> SessionOptions:
    options = SessionOptions()
    options.log_severity_level = 3
    return options


def _split(vector: NDArray[Any], tensors: Sequence[TensorSpec]) -> dict[str, NDArray[Any]]:
    ends = np.cumsum([tensor.size for tensor in tensors])
    pieces = np.split(vector, ends[:-1])
    return {tensor.name: piece.reshape(tensor.shape) for tensor, piece in zip(tensors, pieces, strict=True)}


def _copy_without_dropout(source: Path, target: Path) -> None:
    """Copy a training model with the ratio of every dropout set to zero."""
    model = onnx.load(source)
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.0, np.float32), "verify.ratio"))
    for node in model.graph.node:
        ratio = {"Dropout": 1, "BiasDropout": 3, "DropoutGrad": 2}.get(node.op_type)
        if ratio is not None and len(node.input) > ratio:
            node.input[ratio] = "verify.ratio"
    onnx.save(model, target)
