"""Trials of written files, engine by engine: opened once, and run on batches as a device would.

Dropout is switched off, as its draws can't be compared with torch's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime import InferenceSession, SessionOptions

from export.apart import Apart
from export.batches import Batch
from export.forward.graph import ForwardGraph
from export.step.draws import with_seed
from export.step.dropout import LIMIT, SCALE
from export.step.weight_update import state_shapes
from fedpara_edge.factors.layout import Layout, TensorSpec
from fedpara_edge.formats.bundle import EVAL_STEP, FORMS

STEP = 0.1
"""Learning rate of the optimizer step."""
SEED = 0
"""Seed of what the model draws."""

Tensors = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Results:
    """Results of a batch.

    Attributes:
        loss: Loss of the batch.
        outputs: Outputs of the model in evaluation, by name.
        gradients: Gradients by tensor.
        statistics: Running statistics after the batch, by tensor.
    """

    loss: float
    outputs: Tensors
    gradients: Tensors
    statistics: Tensors


class Trial(Protocol):
    """The files of an engine, ready to run."""

    def run(self, batch: Batch) -> Results:
        """Run training step and evaluation on a batch, both with the initial weights."""
        ...

    def step(self) -> Tensors | None:
        """Weights by tensor after one optimizer step from the last batch; None if the files don't take the step.

        Call it once, at the end.
        """
        ...


OpenTrial = Callable[[], Trial]
"""Function that loads the files of an engine."""


class SecondProcessTrial:
    """A trial in the second process (`export.apart`), as the files may crash the runtime.

    Args:
        make: Class of the trial.
        args: Arguments of the class.
    """

    def __init__(self, make: Callable[..., Trial], *args: Any) -> None:
        self._trial = Apart(make, *args)

    def run(self, batch: Batch) -> Results:
        """Run training step and evaluation on a batch."""
        results: Results = self._trial.call("run", batch)
        return results

    def step(self) -> Tensors | None:
        """Weights after one optimizer step from the last batch."""
        stepped: Tensors | None = self._trial.call("step")
        return stepped


class OrtTrainingTrial:
    """The four artifacts in onnxruntime-training.

    Args:
        folder: Folder of the artifacts.
        graph: Forward pass that they were made from, for errors.
        tensors: Trained tensors.

    Raises:
        InputError: An operator has no kernel for its gradient.
    """

    def __init__(self, folder: Path, graph: ForwardGraph, tensors: Sequence[TensorSpec]) -> None:
        from onnxruntime.training.api import CheckpointState, Module

        from export.artifacts import naming_operators

        self._optimizer = folder / "optimizer_model.onnx"
        self._names, self._outputs = [tensor.name for tensor in tensors], list(graph.outputs)
        self._statistics = list(graph.statistics)
        self._state = CheckpointState.load_checkpoint(folder / "checkpoint")
        with tempfile.TemporaryDirectory() as scratch:
            training_model = Path(scratch) / "training_model.onnx"
            _copy_without_dropout(folder / "training_model.onnx", training_model)
            with naming_operators(graph):
                self._module = Module(training_model, self._state, folder / "eval_model.onnx", session_options=_quiet())

    def run(self, batch: Batch) -> Results:
        """Run training step and evaluation on a batch."""
        heads = len(batch.labels)
        arrays = batch.arrays if heads == 1 else [*batch.arrays, np.ones(heads, np.float32)]  # shares of the whole
        self._module.eval()
        _, *outputs = self._module(*arrays)
        self._module.train()
        self._module.lazy_reset_grad()
        loss, *others = self._module(*arrays)
        statistics = dict(zip(self._statistics, others[len(others) - len(self._statistics) :], strict=True))
        gradients = {name: np.array(self._state.parameters[name].grad) for name in self._names}
        found = dict(zip(self._outputs, outputs[: len(self._outputs)], strict=True))
        return Results(float(loss), found, gradients, statistics)

    def step(self) -> Tensors | None:
        """Weights after one optimizer step from the last batch; None where the runtime has no such optimizer."""
        from onnxruntime.training.api import Optimizer

        if not self._optimizer.exists():
            return None
        optimizer = Optimizer(self._optimizer, self._module)
        optimizer.set_learning_rate(STEP)
        optimizer.step()
        return {name: np.array(self._state.parameters[name].data) for name in self._names}


class OnnxruntimeTrial:
    """The step and the evaluation in standard operators, in onnxruntime.

    Args:
        folder: Folder of the two graphs.
        form: Form of the training step.
        layout: Layout of the model.
        weights: Initial weights, statistics and what updates hold, by tensor.
        optimizer: Constants of the optimizer.
    """

    def __init__(self, folder: Path, form: str, layout: Layout, weights: Tensors, optimizer: Mapping[str, Any]) -> None:
        model = onnx.load(folder / FORMS[form])
        for tensor in model.graph.initializer:
            off = next((value for suffix, value in _OFF.items() if tensor.name.endswith(suffix)), None)
            if off is not None:
                tensor.CopyFrom(numpy_helper.from_array(off, tensor.name))
        flat = _flat(weights, layout.trained)
        none = np.zeros(1, np.float32)
        self._layout = layout
        self._stepped: NDArray[Any] = flat
        self._weights = {"weights": flat}
        self._held = {tensor.name: weights[tensor.name] for tensor in layout.held}
        if layout.statistics:
            self._weights["statistics"] = _flat(weights, layout.statistics)
        self._settings: dict[str, NDArray[Any]] = {
            "seed": np.array(SEED, np.int64),
            "accumulated": none,
            "last": np.array(True),
            "learning_rate": np.array(STEP, np.float32),
            "adjusted": np.array(False),
            "mu": none,
            "h": none,
            "max_norm": np.array(np.inf, np.float32),
            **{name: np.zeros(shape, np.float32) for name, shape in state_shapes(optimizer, len(flat)).items()},
        }
        self._train = _session(model.SerializeToString())
        self._evaluate = _session((folder / EVAL_STEP).read_bytes())

    def run(self, batch: Batch) -> Results:
        """Run training step and evaluation on a batch."""
        heads = len(batch.labels)
        feed = {**batch.inputs, **batch.labels, **self._weights, **self._held}
        settings = {**self._settings, "share": np.ones(() if heads == 1 else heads, np.float32)}
        names = ["loss", "gradient", *(f"new_{name}" for name in self._weights)]
        loss, gradient, self._stepped, *kept = self._train.run(names, feed | settings)
        statistics = _split(kept[0], self._layout.statistics) if kept else {}
        _, *outputs = self._evaluate.run(None, feed)
        names = [output.name for output in self._evaluate.get_outputs()[1:]]
        gradients = _split(gradient, self._layout.trained)
        return Results(float(loss.sum()), dict(zip(names, outputs, strict=True)), gradients, statistics)

    def step(self) -> Tensors:
        """Weights after one optimizer step from the last batch."""
        return _split(self._stepped, self._layout.trained)


_OFF: dict[str, NDArray[Any]] = {LIMIT: np.array(2**32, np.int64), SCALE: np.array(1.0, np.float32)}


def _session(model: bytes) -> InferenceSession:
    options = _quiet()
    # onnxruntime-training keeps its arena: without it, some models, such as an AvgPool1d of tiles, end the process with
    # a corrupted heap.
    options.enable_cpu_mem_arena = False
    return InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _quiet() -> SessionOptions:
    options = SessionOptions()
    options.log_severity_level = 4
    options.enable_mem_pattern = False  # which keeps the most that any batch took
    return options


def _flat(weights: Tensors, tensors: Sequence[TensorSpec]) -> NDArray[Any]:
    return np.concatenate([weights[tensor.name].reshape(-1) for tensor in tensors])


def _split(vector: NDArray[Any], tensors: Sequence[TensorSpec]) -> Tensors:
    ends = np.cumsum([tensor.size for tensor in tensors])
    pieces = np.split(vector, ends[:-1])
    return {tensor.name: piece.reshape(tensor.shape) for tensor, piece in zip(tensors, pieces, strict=True)}


def _copy_without_dropout(source: Path, target: Path) -> None:
    """Copy a training model with the ratio of every dropout set to zero, and with draws from the seed of a trial."""
    model = with_seed(onnx.load(source), SEED)
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.0, np.float32), "verify.ratio"))
    for node in model.graph.node:
        ratio = {"Dropout": 1, "BiasDropout": 3, "DropoutGrad": 2}.get(node.op_type)
        if ratio is not None and len(node.input) > ratio:
            node.input[ratio] = "verify.ratio"
    onnx.save(model, target)
