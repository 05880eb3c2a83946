"""The engine `onnxruntime`: the training step as a plain ONNX graph, on any onnxruntime.

`train_step.onnx` takes the weights and the state of the optimizer as vectors and returns new ones. Each vector is one
array, bound as input and as output, so that a step writes the new values over the old ones and copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device_runtime.engines.affine import Affine, AffineTerm
from device_runtime.engines.micro_batches import MicroBatch, refuse_parts, split_batch
from device_runtime.engines.ort import (
    ERRORS,
    InferenceSession,
    IOBinding,
    message_of,
    running,
    session_options,
)
from device_runtime.engines.protocol import NONE, Adjustment, Arrays, Given, Outcome, named
from device_runtime.engines.vector import Vector, assign, views, zeros
from fedpara_edge.errors import WrongBundleError
from fedpara_edge.formats.bundle import EVAL_STEP, FORMS, WEIGHTS, Bundle
from fedpara_edge.formats.interface import Interface
from fedpara_edge.formats.weights import read_weights


def open_engine(bundle: Bundle, *, threads: int | None = None) -> Portable:
    """Open a bundle in onnxruntime, for training and evaluation.

    Args:
        bundle: Verified bundle with the files of this engine.
        threads: Threads for the operators; None for one per core.

    Raises:
        WrongBundleError: The initial weights are damaged or incomplete.
    """
    return Portable(bundle, threads=threads)


class Portable:
    """Engine on plain onnxruntime; implements `Engine`.

    Each of the two graphs is loaded when first used, as a device usually needs only one.

    Attributes:
        form: Form of the training step, one of `forms`; to be set before the first step.
    """

    name = "onnxruntime"

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        self.bundle, self._threads = bundle, threads
        self.form = next(iter(FORMS))
        layout = bundle.manifest.layout
        self._tensors = layout.trained
        self._weights = zeros(self._tensors)
        kept = zeros(layout.statistics)
        self._statistics = {"statistics": kept} if len(kept) else {}
        self._places = {**views(self._weights, self._tensors), **views(kept, layout.statistics)}
        self._held = {tensor.name: np.zeros(tensor.shape, np.float32) for tensor in layout.held}
        self._state = _fresh_state(bundle.manifest.optimizer, self._weights)
        initial = {**read_weights(bundle.file(WEIGHTS)).whole, **bundle.read_initial_personal()}
        for name in self._all:
            if name not in initial:
                raise WrongBundleError(
                    f"{bundle.path}: tensor {name!r}: expected an initial value, found none; export again"
                )
        self.load({name: initial[name] for name in self._all})

    @property
    def forms(self) -> tuple[str, ...]:
        """Forms of the training step that the bundle has."""
        return self.bundle.manifest.forms

    def load(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Set some tensors by name."""
        assign(self._all, tensors)

    def step(
        self,
        x: Given,
        y: Given,
        *,
        learning_rate: float,
        seed: int,
        adjustment: Adjustment = NONE,
        micro_batches: int = 1,
    ) -> float:
        """Take one optimizer step; return the loss before it."""
        refuse_parts(self.bundle, micro_batches)
        self._trainer.adjust(adjustment)
        loss = 0.0
        interface = self.bundle.interface
        inputs, labels = named(x, interface.inputs), named(y, interface.labels)
        for micro_batch in split_batch(inputs, labels, heads=interface.heads, micro_batches=micro_batches, seed=seed):
            losses = self._trainer.run(micro_batch, learning_rate)
            loss += sum(share * each for share, each in zip(micro_batch.shares, losses, strict=True))
        return loss

    def evaluate(self, x: Given, y: Given) -> Outcome:
        """Mean losses and outputs of a batch, without dropout."""
        interface = self.bundle.interface
        return self._evaluator.run(named(x, interface.inputs), named(y, interface.labels))

    def read(self) -> dict[str, NDArray[np.float32]]:
        """Copies of the trained tensors and the statistics, by name."""
        return {name: place.copy() for name, place in self._places.items()}

    def state(self) -> dict[str, NDArray[Any]]:
        """Weights, statistics and optimizer state, each as one vector."""
        return {name: array.copy() for name, array in self._vectors().items()}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Continue from a state that `state` returned."""
        assign(self._vectors(), state)

    @property
    def _all(self) -> dict[str, NDArray[np.float32]]:
        """Places of all tensors that can be loaded."""
        return {**self._places, **self._held}

    def _vectors(self) -> dict[str, NDArray[np.float32]]:
        """All that a step changes, under the names that it has in the graph."""
        return {"weights": self._weights, **self._statistics, **self._state}

    @cached_property
    def _trainer(self) -> _Trainer:
        heads = len(self.bundle.interface.heads)
        return _Trainer(self._open(FORMS[self.form]), self._vectors(), self._held, AffineTerm(self._tensors), heads)

    @cached_property
    def _evaluator(self) -> _Evaluator:
        vectors = {"weights": self._weights, **self._statistics, **self._held}
        return _Evaluator(self._open(EVAL_STEP), vectors, self.bundle.interface)

    def _open(self, name: str) -> _Graph:
        return _Graph(self.bundle, name, self._threads)


def _fresh_state(optimizer: Mapping[str, Any], weights: Vector) -> dict[str, NDArray[np.float32]]:
    """State of an optimizer before its first step, under the names that it has in the graph."""
    if optimizer["name"] == "sgd":
        return {"momentum": np.zeros_like(weights)} if optimizer.get("momentum") else {}
    return {"moment1": np.zeros_like(weights), "moment2": np.zeros_like(weights), "steps": np.zeros((), np.float32)}


class _Graph:
    """A graph in a session of its own."""

    def __init__(self, bundle: Bundle, name: str, threads: int | None) -> None:
        interface = bundle.interface
        self._path, self._batch = bundle.file(name), [spec.name for spec in (*interface.inputs, *interface.labels)]
        content = bundle.read_graph(name)
        options = session_options(threads)
        options.enable_mem_pattern = (
            False  # saves no time here, and its single large block takes up to a third more memory
        )
        try:
            self._session = InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except ERRORS as error:
            raise self.wrong("a graph that onnxruntime loads", message_of(error)) from error

    def rank(self, name: str) -> int | None:
        """Number of axes of an input; None if the graph has no such input."""
        return next((len(entry.shape) for entry in self._session.get_inputs() if entry.name == name), None)

    def bind(self, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]) -> IOBinding:
        """Bind arrays that the graph reads and writes besides the batch; they must outlive the binding.

        Raises:
            WrongBundleError: The graph has other inputs, or lacks an output.
        """
        expected = {*self._batch, *inputs}
        found = {entry.name for entry in self._session.get_inputs()}
        missing = outputs.keys() - {entry.name for entry in self._session.get_outputs()}
        if expected != found or missing:
            differing = ", ".join(sorted(expected ^ found | missing))
            raise self.wrong("the inputs and outputs that this release knows", f"others ({differing})")
        binding = self._session.io_binding()
        for name, array in inputs.items():
            _bind(binding.bind_input, name, array)
        for name, array in outputs.items():
            _bind(binding.bind_output, name, array)
        return binding

    def run(self, binding: IOBinding, x: Arrays, y: Arrays) -> None:
        """Run on a batch; the results are then in the bound arrays.

        Raises:
            FedparaError: The runtime fails, usually for lack of memory.
        """
        batch = {name: np.ascontiguousarray(array) for name, array in {**x, **y}.items()}
        for name, array in batch.items():
            _bind(binding.bind_input, name, array)
        with running(self._path, _rows(x)):
            self._session.run_with_iobinding(binding)

    def wrong(self, expected: str, found: str) -> WrongBundleError:
        """Error of a graph that is not as it must be."""
        return WrongBundleError(f"{self._path}: expected {expected}, found {found}; export again")


def _bind(bind: Callable[..., None], name: str, array: NDArray[Any]) -> None:
    bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


class _Trainer:
    """Runner of `train_step.onnx`: all but the batch is bound once, and settings are written where it reads them."""

    def __init__(
        self,
        graph: _Graph,
        vectors: Mapping[str, NDArray[np.float32]],
        held: Mapping[str, NDArray[np.float32]],
        affine: AffineTerm,
        heads: int,
    ) -> None:
        self._graph, self._affine = graph, affine
        numbers = ("learning_rate", "max_norm")
        self._nothing = np.zeros(1, np.float32)
        self._inputs: dict[str, NDArray[Any]] = {
            **vectors,
            **held,
            **{name: np.zeros((), np.float32) for name in numbers},
            **{name: np.zeros((), np.bool_) for name in ("last", "adjusted")},
            "seed": np.zeros((), np.int64),
            "share": _by_head(heads),
            "accumulated": self._nothing,
            **self._affine_inputs(affine.vectors(NONE)),
        }
        self._losses = _by_head(heads)
        self._outputs = {"loss": self._losses, **{f"new_{name}": vector for name, vector in vectors.items()}}
        self._whole = graph.bind(self._inputs, self._outputs)
        self._bound = affine.vectors(NONE)
        self._gradient: Vector | None = None
        self._accumulating: IOBinding | None = None

    def adjust(self, adjustment: Adjustment) -> None:
        """Set the adjustment of the gradients from now on.

        Raises:
            WrongBundleError: The graph is of a release with a single μ for all tensors, and μ is for some of them.
        """
        self._write(adjusted=not adjustment.is_none, max_norm=adjustment.max_norm)
        affine = self._affine.vectors(adjustment)
        if affine is not self._bound:
            self._inputs.update(self._affine_inputs(affine))
            self._whole, self._accumulating = self._graph.bind(self._inputs, self._outputs), None
            self._bound = affine

    def _affine_inputs(self, affine: Affine) -> dict[str, NDArray[np.float32]]:
        mu = affine.mu
        if self._graph.rank("mu") == 0:
            if len(mu) > 1:
                raise self._graph.wrong(
                    "a graph that takes a different mu for shared and for personal tensors", "one of an older release"
                )
            mu = mu.reshape(())
        return {"mu": mu, "h": self._nothing if affine.h is None else affine.h}

    def run(self, batch: MicroBatch, learning_rate: float) -> list[float]:
        """Add a micro-batch's gradient to those before it, update the weights after the last; return its losses."""
        self._inputs["share"].reshape(-1)[:] = batch.shares
        self._write(last=batch.last, learning_rate=learning_rate, seed=batch.seed)
        binding = self._whole if batch.first and batch.last else self._bind_accumulation(fresh=batch.first)
        self._graph.run(binding, batch.x, batch.y)
        return self._losses.reshape(-1).tolist()

    def _bind_accumulation(self, *, fresh: bool) -> IOBinding:
        if self._gradient is None:
            self._gradient = np.zeros_like(self._inputs["weights"])
        if self._accumulating is None:
            gradient = self._gradient
            self._accumulating = self._graph.bind(
                {**self._inputs, "accumulated": gradient}, {**self._outputs, "gradient": gradient}
            )
        if fresh:
            self._gradient[...] = 0
        return self._accumulating

    def _write(self, **settings: float) -> None:
        for name, value in settings.items():
            self._inputs[name][...] = value


class _Evaluator:
    """Runner of `eval_step.onnx`."""

    def __init__(self, graph: _Graph, vectors: Mapping[str, NDArray[np.float32]], interface: Interface) -> None:
        self._graph, self._interface = graph, interface
        self._losses = _by_head(len(interface.heads))
        self._binding = graph.bind(vectors, {"loss": self._losses})

    def run(self, x: Arrays, y: Arrays) -> Outcome:
        """Mean losses and outputs [B, ...] of a batch."""
        heads = [head.output for head in self._interface.heads]
        outputs = {spec.name: np.empty((_rows(x), *spec.shape), np.float32) for spec in heads}
        for name, array in outputs.items():
            _bind(self._binding.bind_output, name, array)
        self._graph.run(self._binding, x, y)
        return Outcome(tuple(self._losses.reshape(-1).tolist()), outputs)


def _by_head(heads: int) -> NDArray[np.float32]:
    """Zeros, one for each head: [] for a single one."""
    return np.zeros(() if heads == 1 else heads, np.float32)


def _rows(x: Arrays) -> int:
    return len(next(iter(x.values())))
