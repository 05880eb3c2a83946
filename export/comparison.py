"""What the files of the engines compute on a batch, beside torch, and how far rounding explains the difference."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.attempts import run_trial
from export.batches import Batch
from export.forward.graph import ForwardGraph
from export.reference import UNIT, Reference
from export.trials import Results, Tensors, Trial

TOLERANCE = 1e-5
LIKENESS = 10.0
"""How many times torch's own rounding error an engine's may be, which sums in another order."""
_NEGLIGIBLE = 1e-3
_COMPUTATIONS = 4
_MOVES, _LARGER = 8, 16.0

Errors = Mapping[str, float]
"""Relative errors by what is compared: `loss`, outputs, and the gradient or the running statistic of each tensor."""


class Comparison:
    """A batch in the engines and in torch, computed only as far as it is asked for.

    Args:
        batch: Batch to compare on.
        reference: Model in torch that the files stand for.
        trials: Files by engine, loaded.
        graph: Forward pass of the files, for errors.
    """

    def __init__(self, batch: Batch, reference: Reference, trials: Mapping[str, Trial], graph: ForwardGraph) -> None:
        self.batch = batch
        self._reference, self._trials, self._graph = reference, trials, graph
        self._errors: dict[str, Errors] = {}
        self._rounded: list[Errors] = []
        self._moved: list[float] = []
        self._evaluating = False

    @cached_property
    def is_finite(self) -> bool:
        """Whether torch's results are, without which the batch tells nothing."""
        exact = self._exact
        arrays = (*exact.outputs.values(), *exact.gradients.values(), *exact.statistics.values())
        return math.isfinite(exact.loss) and all(bool(np.isfinite(array).all()) for array in arrays)

    @property
    def overflows(self) -> bool:
        """Whether torch's were not in float32, as far as it was asked for them."""
        return not all(math.isfinite(error) for errors in self._rounded for error in errors.values())

    def errors(self, engine: str) -> Errors:
        """Errors of an engine.

        Raises:
            EngineError: The engine does not run the files on the batch.
        """
        if engine not in self._errors:
            self._errors[engine] = relative_errors(
                run_trial(engine, self._trials[engine], self.batch, self._graph), self._exact
            )
        return self._errors[engine]

    def is_within(self, engine: str) -> bool:
        """Whether every error of an engine is within `TOLERANCE`."""
        return not self._large(engine)

    def allows(self, engine: str) -> bool:
        """Whether every error of an engine is within `TOLERANCE`, or `LIKENESS` times what rounding makes of torch."""
        left = self._large(engine)
        for rounded in self._computations(left) if left else ():
            left = [what for what in left if not self.errors(engine)[what] <= LIKENESS * rounded[what] < math.inf]
            if not left:
                break
        return not left

    def explains(self, engine: str) -> bool:
        """Whether torch moves nearly as much as an engine's largest error if each rounding is a few times larger.

        It does where float32 overflows.
        """
        if self.overflows:
            return True
        worst = max(self.errors(engine).values(), key=lambda error: math.inf if math.isnan(error) else error)
        return any(worst <= LIKENESS * move for move in self._moves(self._large(engine)))

    def rounding(self, engine: str) -> float:
        """Largest error that rounding makes in torch, among what of an engine is not within `TOLERANCE`."""
        return max(map(self._largest, self._large(engine)), default=0.0)

    def worst(self, engine: str) -> tuple[str, float, float]:
        """What of an engine is furthest beyond its limit, its error, and the limit."""
        errors = self.errors(engine)
        limits = {what: max(TOLERANCE, LIKENESS * self._largest(what)) for what in self._large(engine)}

        def excess(what: str) -> float:
            ratio = errors[what] / limits[what]
            return math.inf if math.isnan(ratio) else ratio

        what = max(limits, key=excess)
        return what, errors[what], limits[what]

    @cached_property
    def _exact(self) -> Results:
        return self._reference.exact(self.batch)

    def _large(self, engine: str) -> list[str]:
        return [what for what, error in self.errors(engine).items() if not error <= TOLERANCE]

    def _largest(self, what: str) -> float:
        """Largest error in the computations of torch so far."""
        return max(rounded[what] for rounded in self._rounded)

    def _computations(self, large: Collection[str]) -> Iterator[Errors]:
        """Errors that rounding to float32 makes of torch, computation by computation."""
        self._evaluate(large)
        for number in range(_COMPUTATIONS):
            if number == len(self._rounded):
                found = self._reference.single if number == 0 else partial(self._reference.rounded, seed=number)
                self._rounded.append(relative_errors(found(self.batch, evaluating=self._evaluating), self._exact))
            yield self._rounded[number]

    def _moves(self, large: Collection[str]) -> Iterator[float]:
        """Largest errors that rounding by `_LARGER` units makes of torch."""
        self._evaluate(large)
        for seed in range(_MOVES):
            if seed == len(self._moved):
                found = self._reference.rounded(self.batch, seed=seed, unit=_LARGER * UNIT, evaluating=self._evaluating)
                self._moved.append(max(relative_errors(found, self._exact).values()))
            yield self._moved[seed]

    def _evaluate(self, large: Collection[str]) -> None:
        """Have torch's computations include the evaluation from now on, if an output is among what is large."""
        if not self._evaluating and any(what.startswith("output") for what in large):
            self._evaluating, self._rounded, self._moved = True, [], []


def relative_errors(found: Results, exact: Results) -> Errors:
    """Errors of results, without those of outputs that were not evaluated."""
    floor = _NEGLIGIBLE * float(np.sqrt(sum(np.sum(gradient**2) for gradient in exact.gradients.values())))
    gradients = {
        f"gradient of {name!r}": relative_error(found.gradients[name], gradient, floor=floor)
        for name, gradient in exact.gradients.items()
    }
    outputs = {
        f"output {name!r}": relative_error(output, exact.outputs[name]) for name, output in found.outputs.items()
    }
    statistics = {
        f"statistic {name!r}": relative_error(found.statistics[name], kept, floor=_deviation(exact.statistics, name))
        for name, kept in exact.statistics.items()
    }
    loss = relative_error(np.array(found.loss), np.array(exact.loss))
    return {"loss": loss, **outputs, **gradients, **statistics}


def _deviation(statistics: Tensors, name: str) -> float:
    """Norm of the deviations around a running mean, on whose scale it is rounded; 0 for a variance."""
    variance = statistics.get(name.removesuffix("running_mean") + "running_var")
    return 0.0 if variance is None or name.endswith("running_var") else float(np.linalg.norm(np.sqrt(variance)))


def relative_error(found: NDArray[Any], expected: NDArray[Any], *, floor: float = 0.0) -> float:
    """Distance of arrays in the Frobenius norm, relative to that of `expected` or `floor`; infinite between shapes."""
    if found.shape != expected.shape:
        return math.inf
    difference = float(np.linalg.norm(np.ravel(found).astype(np.float64) - np.ravel(expected)))
    return difference / max(float(np.linalg.norm(expected)), floor, 1e-30)
