"""The engine `torch`: the step of a bundle in torch, with autograd, on a CPU or a GPU.

It is an engine as those of the device runtime are, so that everything around the step is theirs: the order of batches,
micro-batches, federated algorithms, codecs and files. The trained tensors are views of one vector, as are the gradients
and the state of the optimizer.

The loss and the gradient of a batch are computed by torch's own operators, within rounding of what the graphs compute.
Random numbers come from the seed of the step; those of a model's own draws are the graphs', masks of dropouts are not.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from device_runtime.engines.affine import AffineTerm
from device_runtime.engines.micro_batches import MicroBatch, refuse_parts, split_batch
from device_runtime.engines.protocol import NONE, Adjustment, Arrays, Given, Outcome, named
from device_runtime.engines.vector import assign, views
from export.step.draws import Draws
from export.step.frobenius import decays_in_torch
from export.step.jacobian import corrections_in_torch, recording_weights
from export.step.weight_update import CORRECTION, DECAY
from export.torchmodel import TorchModel
from fedpara_edge.formats.bundle import WEIGHTS, Bundle, open_bundle
from fedpara_edge.formats.weights import read_weights
from fedpara_edge.simulation.torchengine.choice import TorchSource
from fedpara_edge.simulation.torchengine.device import ERRORS, Lane, prepare, rounding
from fedpara_edge.simulation.torchengine.optimizers import Form, adjust, make_optimizer
from fedpara_edge.simulation.torchengine.stopping import stop_if_asked
from fedpara_edge.simulation.torchengine.vector import Places

Batch = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Inputs and labels of some rows, on the device."""
_CLOSE = 1e-3
_making = threading.Lock()


def open_engine(bundle: Bundle, source: TorchSource) -> TorchEngine:
    """Open a bundle in torch, for training and evaluation.

    Raises:
        InputError: This machine has no such device, or a part of the recipe does not fit.
        WrongBundleError: The bundle is of another recipe.
    """
    device = prepare(source.choice)
    with _making:  # which seeds torch's only generator
        model = copy.deepcopy(_model(bundle.path, source))
    return TorchEngine(bundle, model, source, device)


@lru_cache(maxsize=8)
def _model(path: Path, source: TorchSource) -> TorchModel:
    return TorchModel(source.recipe, open_bundle(path))


class TorchEngine:
    """Engine in torch; implements `Engine`."""

    name = "torch"

    def __init__(self, bundle: Bundle, model: TorchModel, source: TorchSource, device: torch.device) -> None:
        self.bundle, self._model, self._choice, self._batch_rows = bundle, model, source.choice, source.batch_rows
        layout, constants = bundle.manifest.layout, bundle.manifest.optimizer
        self._trained, self._kept = Places(layout.trained, device), Places(layout.statistics, device)
        self._lane = Lane(device)
        with self._lane.working():
            model.place(device)
            self._weights, self._statistics = self._trained.zeros(), self._kept.zeros()
            self._gradient = self._trained.zeros()
            self._gradients = self._trained.views(self._gradient)
            self._parameters = model.places(layout.trained)
            for tensors, places in (
                (self._parameters, self._trained.views(self._weights)),
                (model.places(layout.statistics), self._kept.views(self._statistics)),
            ):
                for tensor, place in zip(tensors, places, strict=True):
                    tensor.data = place
            held = model.places(layout.held)
            self._held = {tensor.name: place for tensor, place in zip(layout.held, held, strict=True)}
            self._optimizer = make_optimizer(constants, self._weights)
            self._rate, self._loss = torch.zeros((), device=device), torch.zeros((), device=device)
            self._seed = torch.zeros((), dtype=torch.int64, device=device)
            self._shares = torch.ones(len(bundle.interface.heads), device=device)
            self._mu: dict[int, Tensor] = {}
            self._h: Tensor | None = None
        self._correction: float = constants.get(CORRECTION, 0.0)
        self._decay: float = constants.get(DECAY, 0.0)
        self._affine, self._bound, self._form = AffineTerm(layout.trained), NONE, Form()
        self._batches: dict[int, Batch] = {}
        self._uncounted = model.labels_that_never_count() if self._lane.records else None
        self._is_drawing: bool | None = None
        self._is_rowwise: bool | None = None
        self._share: tuple[float, ...] = (1.0,) * len(self._shares)
        self.load({**read_weights(bundle.file(WEIGHTS)).whole, **bundle.read_initial_personal()})

    def load(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Set some tensors by name."""
        with self._lane.working():
            vectors = self._vectors()
            held = {name: tensors[name] for name in self._held if name in tensors}
            assign(self._by_name(vectors), {name: tensors[name] for name in tensors if name not in held})
            self._fill(vectors)
            for name, values in held.items():
                self._held[name].copy_(torch.from_numpy(values))

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
        stop_if_asked()
        refuse_parts(self.bundle, micro_batches)
        interface = self.bundle.interface
        inputs, labels = named(x, interface.inputs), named(y, interface.labels)
        with self._lane.working(_rows(inputs)):
            self._set_adjustment(adjustment)
            self._rate.fill_(learning_rate)
            self._loss.zero_()
            self._gradient.zero_()
            for part in split_batch(inputs, labels, heads=interface.heads, micro_batches=micro_batches, seed=seed):
                self._accumulate(part)
            self._lane.call(("update", self._form), self._update)
            return self._loss.item()

    def evaluate(self, x: Given, y: Given) -> Outcome:
        """Mean losses and outputs of a batch, without dropout."""
        interface = self.bundle.interface
        inputs, labels = named(x, interface.inputs), named(y, interface.labels)
        with self._lane.working(_rows(inputs)), torch.no_grad(), rounding(self._choice):
            losses, outputs = self._model.train(False)(*map(self._placed, (inputs, labels)))
            return Outcome(tuple(losses.tolist()), {name: output.cpu().numpy() for name, output in outputs.items()})

    def read(self) -> dict[str, NDArray[np.float32]]:
        """Copies of the trained tensors and the statistics, by name."""
        with self._lane.working():
            return self._by_name(self._vectors())

    def state(self) -> dict[str, NDArray[Any]]:
        """Weights, statistics and optimizer state, each as one vector."""
        with self._lane.working():
            kept = {
                name: self._trained.pack(vector) if vector.dim() else vector.cpu().numpy().copy()
                for name, vector in self._optimizer.state.items()
            }
            return {**self._vectors(), **kept}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Continue from a state that `state` returned."""
        with self._lane.working():
            self._fill(state)
            for name, vector in self._optimizer.state.items():
                if vector.dim():
                    self._trained.fill(vector, state[name])
                else:
                    vector.fill_(float(state[name]))

    def _fill(self, vectors: Mapping[str, NDArray[Any]]) -> None:
        """Copy packed weights and statistics to their places."""
        self._trained.fill(self._weights, vectors["weights"])
        if "statistics" in vectors:
            self._kept.fill(self._statistics, vectors["statistics"])

    def _vectors(self) -> dict[str, NDArray[Any]]:
        """Packed weights and statistics."""
        kept = self._kept.pack(self._statistics)
        return {"weights": self._trained.pack(self._weights), **({"statistics": kept} if len(kept) else {})}

    def _by_name(self, vectors: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        layout = self.bundle.manifest.layout
        kept = vectors.get("statistics", np.zeros(0, np.float32))
        return {**views(vectors["weights"], layout.trained), **views(kept, layout.statistics)}

    def _set_adjustment(self, adjustment: Adjustment) -> None:
        if adjustment is self._bound:
            return
        affine = self._affine.vectors(adjustment)
        factors = 0
        if affine.mu.any():
            factors = 1 if len(affine.mu) == 1 else len(self._weights)
            mu = self._mu.setdefault(factors, self._weights.new_zeros(factors))
            if factors == 1:
                mu.fill_(float(affine.mu[0]))
            else:
                self._trained.fill(mu, affine.mu)
        if affine.h is not None:
            self._h = self._trained.zeros() if self._h is None else self._h
            self._trained.fill(self._h, affine.h)
        self._form = Form(factors=factors, with_h=affine.h is not None, max_norm=adjustment.max_norm)
        self._bound = adjustment

    def _update(self) -> None:
        """Change the weights by the gradient."""
        adjust(self._gradient, self._weights, self._form, self._mu.get(self._form.factors), self._h)
        self._optimizer.step(self._weights, self._gradient, self._rate)

    def _accumulate(self, part: MicroBatch) -> None:
        """Add the loss and the gradient of a micro-batch."""
        self._seed.fill_(part.seed)
        if self._share != part.shares:
            self._shares.copy_(torch.tensor(part.shares))
            self._share = part.shares
        rows = _rows(part.x)
        if rows < self._batch_rows and self._fills_up(part):
            rows = self._batch_rows
        add = partial(self._add_gradient, self._written(part, rows))
        try:
            if rows == self._batch_rows:
                self._lane.call(("gradient", rows), add)
            else:
                add()
        except ERRORS:
            if rows > 1:
                raise
            # A single row, whose axis a model may squeeze away, is as good as two equal ones.
            x, y = (
                {name: np.concatenate((array, array)) for name, array in given.items()} for given in (part.x, part.y)
            )
            self._add_gradient(self._written(replace(part, x=x, y=y), 2))

    def _add_gradient(self, batch: Batch) -> None:
        with torch.enable_grad(), self._composing() as weights:
            with rounding(self._choice), self._drawing():
                losses, _ = self._model.train(True)(*batch)
            total = (losses * self._shares).sum()
            gradients = torch.autograd.grad(
                total, self._parameters, retain_graph=bool(self._correction), materialize_grads=True
            )
        torch._foreach_add_(self._gradients, gradients)
        self._loss.add_(total.detach())
        added: Mapping[Tensor, Tensor] = {}
        if self._correction:
            added = corrections_in_torch(total, weights, strength=self._correction, learning_rate=self._rate)
        elif self._decay:
            with torch.enable_grad():
                added = decays_in_torch(self._model, self._decay)
            torch._foreach_mul_([*added.values()], self._shares.mean())
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if parameter in added:
                gradient.add_(added[parameter])

    def _composing(self) -> AbstractContextManager[Mapping[Any, Any]]:
        """Context that yields the weights composed meanwhile by layer, where they are needed."""
        return recording_weights(self._model) if self._correction else nullcontext({})

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """Context in which all that is random comes from the seed of the step.

        Attention is computed by its definition, as kernels that fuse it draw the masks of its dropout by themselves.
        """
        if self._is_drawing is False:
            yield
            return
        with sdpa_kernel(SDPBackend.MATH), Draws(self._seed, dropping=True) as draws:
            yield
        self._is_drawing = draws.is_used

    def _written(self, part: MicroBatch, rows: int) -> Batch:
        """A micro-batch on the device, in the place of all of that many rows; further rows there don't count."""
        if rows not in self._batches:
            arrays = (
                {name: np.zeros((rows, *array.shape[1:]), array.dtype) for name, array in given.items()}
                for given in (part.x, part.y)
            )
            inputs, labels = (self._placed(given) for given in arrays)
            self._batches[rows] = inputs, labels
        count = _rows(part.x)
        for given, places in zip((part.x, part.y), self._batches[rows], strict=True):
            for name, array in given.items():
                places[name][:count].copy_(torch.from_numpy(array))
                if count < rows and self._uncounted is not None and name in self._uncounted:
                    places[name][count:] = self._uncounted[name]
        return self._batches[rows]

    def _fills_up(self, part: MicroBatch) -> bool:
        """Whether further rows that don't count leave the loss as it is, which is found out with the first batch."""
        if self._uncounted is None or self._is_rowwise is not None:
            return bool(self._is_rowwise)
        with torch.no_grad(), rounding(self._choice), self._drawing():
            model = self._model.train(True)
            alone = model(*map(self._placed, (part.x, part.y)))[0]
            among = model(*self._written(part, self._batch_rows))[0]
        self._is_rowwise = bool(torch.allclose(alone, among, rtol=_CLOSE, atol=_CLOSE))
        return self._is_rowwise

    def _placed(self, arrays: Arrays) -> dict[str, Tensor]:
        return {name: torch.from_numpy(array).to(self._lane.device) for name, array in arrays.items()}


def _rows(arrays: Arrays) -> int:
    return len(next(iter(arrays.values())))
