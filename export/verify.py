"""Verification of the exporter's own work: the written files must train what the PyTorch model trains.

The reference is torch in double precision, so that what is measured is the files' own error (`reference`). A result is
right if it is within `TOLERANCE` of the reference, or no further from it than `LIKENESS` times what rounding to float32
makes of torch's own, tensor by tensor. `trials` finds out what the files compute,
engine by engine, on single rows and on batches of `SIZES`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.attempts import EngineError, open_trial, rows_of, run_trial
from export.batches import Batch, Batches, joined
from export.comparison import LIKENESS, TOLERANCE, Comparison
from export.forward.graph import ForwardGraph
from export.reference import Reference
from export.step.weight_update import CORRECTION, DECAY
from export.trials import STEP, OpenTrial, Tensors, Trial
from fedpara_edge.errors import FedparaError, InputError
from fedpara_edge.factors.layout import TensorSpec

SIZES = (5, 2, 3)
"""Rows of the batches besides single ones: more than at tracing, and what a last batch may have."""
_ROWS, _BATCHES = 4, 10


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
            owner = tensor.name.rpartition(".")[0] or tensor.name
            raise InputError(
                f"parameter {tensor.name!r}: expected {list(tensor.shape)} in the graph and in use, found "
                f"{'it unused or folded away' if found in (None, tensor.shape) else list(found or ())}; "
                f"remove it from the model or leave it as it is, --freeze {owner!r} (nothing was written)"
            )


def verify(
    openers: Mapping[str, OpenTrial],
    reference: Reference,
    *,
    graph: ForwardGraph,
    optimizer: Mapping[str, Any],
    batches: Batches,
    on_step: Callable[[str], None],
) -> dict[str, Verification]:
    """Compare what the files of each engine compute with torch: loss, gradients, outputs and optimizer step.

    A ReLU whose input is within rounding of zero, or a tie in a max pooling, may fall on the other side in double
    precision. Single rows meet few of these kinks: two on which all is well make up the larger batches. A batch that
    meets one where none of torch's computations does is skipped in favor of the next, but only if torch's own results
    move nearly as much with roundings a few times larger: a wrong graph differs where they stand still, and is refused
    at once. A batch on which torch's own results are not finite is skipped too.

    Args:
        openers: Functions that load the files, by engine.
        reference: Model in torch that the files stand for.
        graph: Forward pass of the files, for errors.
        optimizer: Constants of the optimizer.
        batches: Source of the batches.
        on_step: Function that is called with what is being done.

    Returns:
        Errors by engine.

    Raises:
        EngineError: A runtime does not run the files, or not on every number of rows, or a result differs, and rounding
            does not explain it.
        InputError: Torch's own results are not finite on any of the batches.
    """
    on_step("loading the files")
    trials = {engine: open_trial(engine, opener) for engine, opener in openers.items()}

    def compared(size: int, likely: Sequence[Batch] = ()) -> Iterator[Comparison]:
        drawn = (batches.draw(size, number) for number in range(_BATCHES))
        found = (Comparison(batch, reference, trials, graph) for batch in itertools.chain(likely, drawn))
        return _finite(found)

    on_step("verifying single rows")
    rows, verified = _find_rows(trials, compared(1))
    for size in SIZES:
        on_step(f"verifying batches of {size}")
        likely = [joined([rows[number % len(rows)] for number in range(size)])] if rows else []
        found = _verified(trials, compared(size, likely))
        verified = {engine: worse(verified[engine], found[engine]) for engine in trials}
    batch = next(compared(SIZES[-1])).batch
    for engine, trial in trials.items():
        gradients = run_trial(engine, trial, batch, graph).gradients
        step = _step_error(engine, trial, reference.weights, gradients, optimizer)
        verified[engine] = replace(verified[engine], step=step)
    return verified


def _finite(comparisons: Iterable[Comparison]) -> Iterator[Comparison]:
    """Those on whose batches torch's own results are finite, of which there must be one."""
    found = False
    for comparison in comparisons:
        if comparison.is_finite:
            found = True
            yield comparison
    if not found:
        raise _not_finite()


def _not_finite(where: str = "") -> InputError:
    return InputError(
        f"model: expected finite losses, gradients and outputs from torch{where}, found NaN or Inf on every batch; "
        "verify it on rows that it takes (--example), or mend it (nothing was written)"
    )


def _find_rows(
    engines: Collection[str], comparisons: Iterator[Comparison]
) -> tuple[list[Batch], dict[str, Verification]]:
    """Two rows on which all engines are within `TOLERANCE`, or as many as there are among the first, and errors.

    Raises:
        EngineError: The files don't run, or are wrong for single rows.
    """
    rows: list[Batch] = []
    verified: dict[str, Verification] = {}
    first = next(comparisons)
    for comparison in itertools.chain([first], itertools.islice(comparisons, _ROWS - 1)):
        if all(comparison.is_within(engine) for engine in engines):
            rows.append(comparison.batch)
            for engine in engines:
                found = _summary(comparison, engine)
                verified[engine] = worse(verified.get(engine, found), found)
        if len(rows) == 2:  # enough to tell them apart
            break
    return rows, verified or _verified(engines, itertools.chain([first], comparisons))


def _verified(engines: Collection[str], comparisons: Iterable[Comparison]) -> dict[str, Verification]:
    """Errors by engine, each on the first batch on which the engine is right.

    Raises:
        EngineError: There is none.
    """
    verified: dict[str, Verification] = {}
    for number, comparison in enumerate(comparisons, start=1):
        for engine in [engine for engine in engines if engine not in verified]:
            if comparison.allows(engine):
                verified[engine] = _summary(comparison, engine)
            elif not comparison.explains(engine):
                raise _refusal(comparison, engine, number)
        if len(verified) == len(engines):
            return verified
    raise _refusal(comparison, next(engine for engine in engines if engine not in verified), number)


def _refusal(comparison: Comparison, engine: str, number: int) -> EngineError:
    if comparison.overflows:
        return EngineError(engine, _not_finite(" in float32"))
    what, error, limit = comparison.worst(engine)
    refusal = FedparaError(
        f"{engine}: {what}: expected torch's result within {limit:.2g} relative, found {error:.2g}, on batch "
        f"{number} of {rows_of(comparison.batch)}; nothing was written: please report this model"
    )
    return EngineError(engine, refusal)


def _summary(comparison: Comparison, engine: str) -> Verification:
    errors = comparison.errors(engine)
    outputs = max(error for what, error in errors.items() if what.startswith("output"))
    gradients = max(error for what, error in errors.items() if not what.startswith(("loss", "output")))
    return Verification(errors["loss"], gradients, outputs, rounding=comparison.rounding(engine))


def worse(one: Verification, other: Verification) -> Verification:
    """The larger errors of both."""
    return Verification(
        max(one.loss, other.loss),
        max(one.gradient, other.gradient),
        max(one.outputs, other.outputs),
        max((step for step in (one.step, other.step) if step is not None), default=None),
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
    constants = {key: value for key, value in optimizer.items() if key not in ("name", CORRECTION, DECAY)}
    _OPTIMIZERS[optimizer["name"]]([parameter], lr=STEP, **constants).step()
    return parameter.detach().numpy()


_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
