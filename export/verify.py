"""Verification of the exporter's own work: the written files must train what the PyTorch model trains.

The reference is torch in double precision, so that what is measured is the files' own error (`reference`). A result is
right if it is within `TOLERANCE` of the reference, or no further from it than `LIKENESS` times what rounding to float32
makes of torch's own, tensor by tensor. `trials` finds out what the files compute,
engine by engine, on single rows and on batches of `SIZES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.attempts import EngineError, open_trial, rows_of, run_trial
from export.batches import Batch, joined
from export.forward.graph import ForwardGraph
from export.reference import UNIT, Reference
from export.step.weight_update import CORRECTION
from export.trials import STEP, OpenTrial, Results, Tensors, Trial
from fedpara_edge.errors import FedparaError, InputError
from fedpara_edge.factors.layout import TensorSpec

TOLERANCE = 1e-5
LIKENESS = 10.0
"""How many times torch's own rounding error an engine's may be, which sums in another order."""
SIZES = (5, 2, 3)
"""Rows of the batches besides single ones: more than at tracing, and what a last batch may have."""
_NEGLIGIBLE = 1e-3
_ROWS, _BATCHES, _COMPUTATIONS, _KINKED = 4, 10, 4, 1
_MOVES, _LARGER = 8, 16.0


@dataclass(frozen=True)
class Verification:
    """Relative errors of an engine's files against torch in double precision, the largest over all batches.

    `gradient` and `step` are the largest over the parameters, in the Frobenius norm; a gradient that is (nearly) zero
    is compared on the scale of 1e-3 times the norm of all gradients together, where float32 has its rounding. `step` is
    that of the change that the optimizer makes; None where the files don't contain the optimizer. `rounding` is the
    largest error that rounding to float32 makes of torch, among what is not within `TOLERANCE`. All are at most
    `TOLERANCE` or `LIKENESS` times that.
    """

    loss: float
    gradient: float
    outputs: float
    step: float | None = None
    rounding: float = 0.0

    @property
    def worst(self) -> float:
        """Largest of the errors."""
        return max(self.loss, self.gradient, self.outputs, self.step or 0.0)

    @property
    def limit(self) -> float:
        """Largest error that is right."""
        return max(TOLERANCE, LIKENESS * self.rounding)


def check_parameters(graph: ForwardGraph, tensors: Sequence[TensorSpec]) -> None:
    """Check that every trained tensor is an initializer of the graph under its name and shape, and used there.

    Raises:
        InputError: A tensor is not: the model does not use it, or the exporter folded it into something else.
    """
    initializers = {tensor.name: tuple(tensor.dims) for tensor in graph.model.graph.initializer}
    used = {name for node in graph.model.graph.node for name in node.input}
    for tensor in tensors:
        found = initializers.get(tensor.name)
        if found != tensor.shape or tensor.name not in used:
            raise InputError(
                f"parameter {tensor.name!r}: expected {list(tensor.shape)} in the graph and in use, found "
                f"{'it unused or folded away' if found in (None, tensor.shape) else list(found or ())}; "
                "remove it from the model or set requires_grad=False (nothing was written)"
            )


def verify(
    openers: Mapping[str, OpenTrial],
    reference: Reference,
    *,
    graph: ForwardGraph,
    optimizer: Mapping[str, Any],
    draw: Callable[[int, int], Batch],
    on_step: Callable[[str], None],
) -> dict[str, Verification]:
    """Compare what the files of each engine compute with torch: loss, gradients, outputs and optimizer step.

    A ReLU whose input is within rounding of zero, or a tie in a max pooling, may fall on the other side in double
    precision. Single rows meet few of these kinks: two on which all is well make up the larger batches. A batch that
    meets one is skipped in favor of the next, but only if torch's own results move nearly as much with
    rounding of `_LARGER` units: a wrong graph differs where they stand still, and is refused at once. Where kinks lie
    so close that none of `_BATCHES` batches avoids them, what rounding makes of torch may include one as well.

    Args:
        openers: Functions that load the files, by engine.
        reference: Model in torch that the files stand for.
        graph: Forward pass of the files, for errors.
        optimizer: Constants of the optimizer.
        draw: Function from a number of rows and the number of a batch to that batch.
        on_step: Function that is called with what is being done.

    Returns:
        Errors by engine.

    Raises:
        EngineError: A runtime does not run the files, or not on every number of rows, or a result differs, and rounding
            does not explain it.
    """
    on_step("loading the files")
    trials = {engine: open_trial(engine, opener) for engine, opener in openers.items()}
    on_step("verifying single rows")
    rows, verified = _find_rows(trials, reference, graph, draw)
    for size in SIZES:
        on_step(f"verifying batches of {size}")
        batch = joined([rows[number % len(rows)] for number in range(size)]) if rows else draw(size, 0)
        found = _within(trials, reference, graph, batch) or _verified(trials, reference, graph, size, draw)
        verified = {engine: _worse(verified[engine], found[engine]) for engine in trials}
    for engine, trial in trials.items():
        gradients = run_trial(engine, trial, batch, graph).gradients
        step = _step_error(engine, trial, reference.weights, gradients, optimizer)
        verified[engine] = replace(verified[engine], step=step)
    return verified


Errors = Mapping[str, float]
"""Relative errors by what is compared: `loss`, outputs, and the gradient or the running statistic of each tensor."""


class _Rounding:
    """Errors that rounding to float32 makes of torch on a batch, computed only as far as they are asked for."""

    def __init__(self, reference: Reference, batch: Batch, exact: Results) -> None:
        self._reference, self._batch, self._exact = reference, batch, exact
        self._computed: list[Errors] = []
        self._larger: list[float] = []

    def allows(self, errors: Errors) -> bool:
        """Whether every error is within `LIKENESS` times that of all computations but one."""
        exceeding = dict.fromkeys((what for what, error in errors.items() if not error <= TOLERANCE), 0)
        if not exceeding:
            return True
        for computed in self._computations():
            for what in exceeding:
                exceeding[what] += not errors[what] <= LIKENESS * computed[what]
            if max(exceeding.values()) > _KINKED:
                return False
        return True

    def allows_with_kinks(self, errors: Errors) -> bool:
        """Whether every error is within `LIKENESS` of that of any computation."""
        largest = {what: max(each[what] for each in self._computations()) for what in errors}
        return all(error <= max(TOLERANCE, LIKENESS * largest[what]) for what, error in errors.items())

    def explains(self, errors: Errors) -> bool:
        """Whether torch moves nearly as much as the largest error if each rounding is a few times larger."""
        worst = max(errors.values(), key=lambda error: math.inf if math.isnan(error) else error)
        return any(worst <= LIKENESS * move for move in self._moves())

    def of(self, errors: Errors) -> Errors:
        """What rounding makes of whatever is not within `TOLERANCE`."""
        return {what: self.typical(what) for what, error in errors.items() if error > TOLERANCE}

    def typical(self, what: str) -> float:
        """The least error of something but for those of `_KINKED` computations, which may be small by chance."""
        return sorted(each[what] for each in self._computations())[_KINKED]

    def _computations(self) -> Iterator[Errors]:
        for number in range(_COMPUTATIONS):
            if number == len(self._computed):
                found = self._reference.rounded(self._batch, number) if number else self._reference.single(self._batch)
                self._computed.append(_errors(found, self._exact))
            yield self._computed[number]

    def _moves(self) -> Iterator[float]:
        for seed in range(_MOVES):
            if seed == len(self._larger):
                moved = self._reference.rounded(self._batch, seed, _LARGER * UNIT)
                self._larger.append(max(_errors(moved, self._exact).values()))
            yield self._larger[seed]


def _find_rows(
    trials: Mapping[str, Trial], reference: Reference, graph: ForwardGraph, draw: Callable[[int, int], Batch]
) -> tuple[list[Batch], dict[str, Verification]]:
    """Two rows on which all engines are within `TOLERANCE`, or as many as there are among the first, and errors.

    Raises:
        FedparaError: The files are wrong for single rows.
    """
    rows: list[Batch] = []
    verified: dict[str, Verification] = {}
    for number in range(_ROWS):
        row = draw(1, number)
        found = _within(trials, reference, graph, row)
        if found is not None:
            rows.append(row)
            verified = {engine: _worse(verified.get(engine, each), each) for engine, each in found.items()}
        if len(rows) == 2:  # enough to tell them apart
            break
    return rows, verified or _verified(trials, reference, graph, 1, draw)


def _within(
    trials: Mapping[str, Trial], reference: Reference, graph: ForwardGraph, batch: Batch
) -> dict[str, Verification] | None:
    """Errors by engine on a batch; None if one is beyond `TOLERANCE`."""
    exact = reference.exact(batch)
    verified = {}
    for engine, trial in trials.items():
        errors = _errors(run_trial(engine, trial, batch, graph), exact)
        if not all(error <= TOLERANCE for error in errors.values()):
            return None
        verified[engine] = _summary(errors, {})
    return verified


def _verified(
    trials: Mapping[str, Trial],
    reference: Reference,
    graph: ForwardGraph,
    rows: int,
    draw: Callable[[int, int], Batch],
) -> dict[str, Verification]:
    """Errors by engine, each on the first batch on which the engine is right.

    Raises:
        EngineError: There is none.
    """
    verified: dict[str, Verification] = {}
    near_kinks: dict[str, Verification] = {}
    for number in range(_BATCHES):
        batch = draw(rows, number)
        exact = reference.exact(batch)
        rounding = _Rounding(reference, batch, exact)
        for engine in trials.keys() - verified.keys():
            errors = _errors(run_trial(engine, trials[engine], batch, graph), exact)
            if rounding.allows(errors):
                verified[engine] = _summary(errors, rounding.of(errors))
            elif not rounding.explains(errors):
                raise _refusal(engine, errors, rounding, batch, number)
            elif rounding.allows_with_kinks(errors):
                near_kinks.setdefault(engine, _summary(errors, rounding.of(errors)))
        if verified.keys() == trials.keys():
            return verified
    verified = {**near_kinks, **verified}
    if verified.keys() < trials.keys():
        raise _refusal(engine, errors, rounding, batch, number)
    return verified


def _refusal(engine: str, errors: Errors, rounding: _Rounding, batch: Batch, number: int) -> EngineError:
    def excess(what: str) -> float:
        ratio = errors[what] / max(TOLERANCE, LIKENESS * rounding.typical(what))
        return math.inf if math.isnan(ratio) else ratio

    what = max(errors, key=excess)
    limit = max(TOLERANCE, LIKENESS * rounding.typical(what))
    refusal = FedparaError(
        f"{engine}: {what}: expected torch's result within {limit:.2g} relative, found {errors[what]:.2g}, on batch "
        f"{number + 1} of {rows_of(batch)}; nothing was written: please report this model"
    )
    return EngineError(engine, refusal)


def _errors(found: Results, exact: Results) -> Errors:
    floor = _NEGLIGIBLE * float(np.sqrt(sum(np.sum(gradient**2) for gradient in exact.gradients.values())))
    gradients = {
        f"gradient of {name!r}": _relative(found.gradients[name], gradient, floor=floor)
        for name, gradient in exact.gradients.items()
    }
    outputs = {f"output {name!r}": _relative(found.outputs[name], output) for name, output in exact.outputs.items()}
    statistics = {
        f"statistic {name!r}": _relative(found.statistics[name], kept, floor=_deviation(exact.statistics, name))
        for name, kept in exact.statistics.items()
    }
    loss = _relative(np.array(found.loss), np.array(exact.loss))
    return {"loss": loss, **outputs, **gradients, **statistics}


def _deviation(statistics: Tensors, name: str) -> float:
    """Norm of the deviations around a running mean, on whose scale it is rounded; 0 for a variance."""
    variance = statistics.get(name.removesuffix("running_mean") + "running_var")
    return 0.0 if variance is None or name.endswith("running_var") else float(np.linalg.norm(np.sqrt(variance)))


def _summary(errors: Errors, rounding: Errors) -> Verification:
    outputs = max(error for what, error in errors.items() if what.startswith("output"))
    gradients = max(error for what, error in errors.items() if not what.startswith(("loss", "output")))
    return Verification(errors["loss"], gradients, outputs, rounding=max(rounding.values(), default=0.0))


def _worse(one: Verification, other: Verification) -> Verification:
    return Verification(
        max(one.loss, other.loss),
        max(one.gradient, other.gradient),
        max(one.outputs, other.outputs),
        rounding=max(one.rounding, other.rounding),
    )


def _step_error(
    engine: str, trial: Trial, weights: Tensors, gradients: Tensors, optimizer: Mapping[str, Any]
) -> float | None:
    """Largest relative error of the change of a tensor by the optimizer, given the files' own gradients.

    Torch's gradients would not do, because AdamW divides a gradient by its size: near zero, that amplifies a rounding
    error. A change below 1 % of the weight is compared on that scale, on which float32 rounds the new weight.

    Raises:
        EngineError: It is beyond the tolerance.
    """
    stepped = trial.step()
    if stepped is None:
        return None
    errors = {}
    for name, found in stepped.items():
        expected = _stepped(weights[name], gradients[name], optimizer)
        floor = max(float(np.linalg.norm(expected - weights[name])), _SMALL_STEP * float(np.linalg.norm(expected)))
        errors[name] = float(np.linalg.norm(found - expected)) / max(floor, 1e-30)
    worst = max(errors, key=errors.__getitem__)
    if not errors[worst] <= TOLERANCE:
        refusal = FedparaError(
            f"{engine}: {optimizer['name']} step of {worst!r}: expected torch's within {TOLERANCE:g} relative, found "
            f"{errors[worst]:.2g}; nothing was written: please report this model"
        )
        raise EngineError(engine, refusal)
    return errors[worst]


_SMALL_STEP = 0.01


def _stepped(weight: NDArray[Any], gradient: NDArray[Any], optimizer: Mapping[str, Any]) -> NDArray[Any]:
    """Weight after one step of torch's optimizer, in double precision."""
    parameter = torch.nn.Parameter(torch.from_numpy(weight.copy()))
    parameter.grad = torch.from_numpy(gradient.astype(np.float64))
    constants = {key: value for key, value in optimizer.items() if key not in ("name", CORRECTION)}
    _OPTIMIZERS[optimizer["name"]]([parameter], lr=STEP, **constants).step()
    return parameter.detach().numpy()


_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


def _relative(found: NDArray[Any], expected: NDArray[Any], *, floor: float = 0.0) -> float:
    if found.shape != expected.shape:
        return math.inf
    difference = float(np.linalg.norm(np.ravel(found).astype(np.float64) - np.ravel(expected)))
    return difference / max(float(np.linalg.norm(expected)), floor, 1e-30)
