"""The engine `ort-training`: onnxruntime-training's artifacts through its compiled classes, without torch.

The runtime computes the gradients; the rest is numpy on the runtime's own memory (`optimizers`), because its optimizers
support neither momentum nor clipping nor the affine term.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device_runtime.engines.affine import AffineTerm
from device_runtime.engines.micro_batches import split_batch
from device_runtime.engines.optimizers import adjust, make_optimizer
from device_runtime.engines.ort import keep_freed_memory, message_of, native, running, session_options, set_seed
from device_runtime.engines.protocol import NONE, Adjustment, Arrays, Given, Outcome, named
from device_runtime.engines.vector import Vector, assign, pieces, views
from fedpara_edge.errors import WrongBundleError
from fedpara_edge.formats.bundle import WEIGHTS, Bundle
from fedpara_edge.formats.weights import read_weights

try:
    from onnxruntime.capi._pybind_state import Module, load_checkpoint
except ImportError as error:
    message = "the installed onnxruntime cannot train; pip uninstall it first"
    raise ImportError(message, name="onnxruntime") from error

_GRAPHS = ("training_model.onnx", "eval_model.onnx")
_CPU = native.OrtDevice(native.OrtDevice.cpu(), native.OrtDevice.default_memory(), 0)
_PIECE = 1 << 15  # entries; the at most 4 vectors that the optimizer needs of a piece fit in a cache of 512 KiB


def open_engine(bundle: Bundle, *, threads: int | None = None) -> OrtTraining:
    """Load a bundle's artifacts into onnxruntime-training.

    Args:
        bundle: Verified bundle with the files of this engine.
        threads: Threads for the operators; None for one per core.

    Raises:
        WrongBundleError: The runtime refuses the files.
    """
    keep_freed_memory()
    return OrtTraining(bundle, threads=threads)


class OrtTraining:
    """Engine on onnxruntime-training; implements `Engine`."""

    name = "ort-training"

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        self.bundle = bundle
        self._tensors = bundle.manifest.layout.trained
        self._train_model, self._eval_model = (bundle.file(name) for name in _GRAPHS)
        for name in _GRAPHS:
            bundle.read_graph(name)  # as a check only: the runtime reads the file itself
        _refuse_more_checkpoint(bundle)
        try:
            self._checkpoint = load_checkpoint(
                str(bundle.file("checkpoint"))
            )  # the module keeps only a reference to it
            self._module = Module(
                str(self._train_model),
                self._checkpoint,
                str(self._eval_model),
                _CPU,
                session_options(threads),
            )
            parameters = [self._checkpoint.get_parameter(tensor.name) for tensor in self._tensors]
            kept = [self._checkpoint.get_parameter(tensor.name).data for tensor in bundle.manifest.layout.statistics]
            held = [self._checkpoint.get_parameter(tensor.name).data for tensor in bundle.manifest.layout.held]
        except RuntimeError as error:
            raise WrongBundleError(
                f"{bundle.path}: expected artifacts that onnxruntime-training loads, found {message_of(error)}; "
                "export again"
            ) from error
        # The runtime keeps both in the same place from step to step.
        self._values = [(parameter.data, parameter.grad) for parameter in parameters]
        whole = [(_view(data), _view(gradient)) for data, gradient in self._values]
        self._whole = [data for data, _ in whole]
        self._weights = [piece for data, _ in whole for piece in _small(data)]
        self._gradients = [piece for _, gradient in whole for piece in _small(gradient)]
        self._kept = kept, held
        self._statistics = {
            tensor.name: _view(value).reshape(tensor.shape)
            for tensor, value in zip(bundle.manifest.layout.statistics, kept, strict=True)
        }
        self._held = {
            tensor.name: _view(value).reshape(tensor.shape)
            for tensor, value in zip(bundle.manifest.layout.held, held, strict=True)
        }
        if held:
            initial = read_weights(bundle.file(WEIGHTS)).whole
            self.load({name: initial[name] for name in (*self._views(), *self._held) if name in initial})
        self._optimizer = make_optimizer(bundle.manifest.optimizer, self._weights)
        self._affine = AffineTerm(self._tensors)

    def load(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Set some tensors by name."""
        assign({**self._views(), **self._held}, tensors)

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
        loss = self._take_gradients(x, y, seed=seed, micro_batches=micro_batches)
        with np.errstate(over="ignore", invalid="ignore"):  # the loss shows if the training diverges
            if not adjustment.is_none:
                affine = self._affine.vectors(adjustment)
                h = None if affine.h is None else pieces(affine.h, self._weights)
                mu = None if len(affine.mu) == 1 else pieces(affine.mu, self._weights)
                adjust(self._gradients, self._weights, adjustment, h, mu)
            self._optimizer.step(self._weights, self._gradients, learning_rate)
        return loss

    def evaluate(self, x: Given, y: Given) -> Outcome:
        """Mean losses and outputs of a batch, without dropout."""
        interface = self.bundle.interface
        inputs, labels = named(x, interface.inputs), named(y, interface.labels)
        fetches = native.OrtValueVector()
        heads = interface.heads
        with running(self._eval_model, len(next(iter(inputs.values())))):
            self._module.eval_step(self._batch(inputs, labels, [1.0] * len(heads)), fetches)
        outputs = {head.output.name: fetches[1 + number].numpy() for number, head in enumerate(heads)}
        losses = fetches[0 if len(heads) == 1 else 1 + len(interface.outputs)].numpy()
        return Outcome(tuple(losses.reshape(-1).tolist()), outputs)

    def read(self) -> dict[str, NDArray[np.float32]]:
        """Copies of the trained tensors and the statistics, by name."""
        return {name: tensor.copy() for name, tensor in self._views().items()}

    def state(self) -> dict[str, NDArray[Any]]:
        """Weights, statistics and optimizer state, each as one vector."""
        kept = [value.reshape(-1) for value in self._statistics.values()]
        statistics = {"statistics": np.concatenate(kept)} if kept else {}
        state = {name: vector.copy() for name, vector in self._optimizer.state.items()}
        return {"weights": np.concatenate(self._weights), **statistics, **state}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Continue from a state that `state` returned."""
        for piece, saved in zip(self._weights, pieces(state["weights"], self._weights), strict=True):
            piece[...] = saved
        if self._statistics:
            assign(self._statistics, views(state["statistics"], self.bundle.manifest.layout.statistics))
        for name, tensor in self._optimizer.state.items():
            tensor[...] = state[name]

    def _take_gradients(self, x: Given, y: Given, *, seed: int, micro_batches: int) -> float:
        """Leave the gradient of the batch in `_gradients`; return its mean loss."""
        interface = self.bundle.interface
        inputs, labels = named(x, interface.inputs), named(y, interface.labels)
        self._module.lazy_reset_grad()
        loss, weight, heads = 0.0, 1.0, interface.heads
        for micro_batch in split_batch(inputs, labels, heads=heads, micro_batches=micro_batches, seed=seed):
            share = micro_batch.shares[0] if len(heads) == 1 else 1.0  # with several heads, the graph multiplies
            if share and not micro_batch.first:
                self._scale(weight / share)  # the runtime adds the next gradient to this one unscaled
            set_seed(micro_batch.seed)  # the generator of dropout masks
            fetches = native.OrtValueVector()
            batch = self._batch(micro_batch.x, micro_batch.y, micro_batch.shares)
            with running(self._train_model, len(batch[0])):
                self._module.train_step(batch, fetches)
            weight = share or weight  # where nothing counts, the gradient is zero
            loss += share * float(fetches[0].numpy())
            for number, old in enumerate(self._statistics.values(), len(fetches) - len(self._statistics)):
                old[...] = fetches[number].numpy()
        self._scale(weight)
        return loss

    def _batch(self, x: Arrays, y: Arrays, shares: Sequence[float]) -> list[NDArray[Any]]:
        """Arrays that the models take, in their order."""
        of_heads = [np.array(shares, np.float32)] if len(shares) > 1 else []
        return [*x.values(), *y.values(), *of_heads]

    def _scale(self, factor: float) -> None:
        for gradient in self._gradients if factor != 1 else ():
            gradient *= factor

    def _views(self) -> dict[str, NDArray[np.float32]]:
        trained = zip(self._tensors, self._whole, strict=True)
        return {**{tensor.name: data.reshape(tensor.shape) for tensor, data in trained}, **self._statistics}


def _refuse_more_checkpoint(bundle: Bundle) -> None:
    """Refuse a second file of the checkpoint, which a checkpoint may name, and which we never write."""
    more = bundle.file("checkpoint.data")
    if os.path.lexists(more):
        raise WrongBundleError(f"{more}: expected no such file in a bundle, found one; copy the whole bundle again")


def _view(value: Any) -> Vector:
    """Flat view of a float32 OrtValue's memory, valid for as long as the OrtValue lives."""
    size = math.prod(value.shape())
    return np.ctypeslib.as_array((ctypes.c_float * size).from_address(value.data_ptr()))


def _small(vector: Vector) -> Iterator[Vector]:
    return (vector[start : start + _PIECE] for start in range(0, len(vector), _PIECE))
