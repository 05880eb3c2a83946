"""Refit of the mean of the factors to the mean of the weights they compose to.

The mean of the factors composes to another weight than the mean M of the composed weights (`gap`). From it, a few
Gauss-Newton steps lower ||W(factors) - M||_F for each layer on its own:

    δ = argmin ||J δ - (M - W)||_F,    factors ← factors + δ

each solved by some conjugate gradient steps on the normal equations (CGLS), which begin at δ = 0. So the factors stay
near their mean and never move along directions that leave the weight as it is. A step that does not lower the error is
halved until it does.

M is of the size of the dense model, and factors of that rank need not come near it; the rest remains
(`Refit.after`). It takes a second pass over the updates, in which each is decoded and composed whole: 12 bytes
for each dense weight, whatever the number of updates. Of pFedPara only W1 is refitted: W2 never leaves the devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.aggregation.gap import relative_gap
from fedpara_edge.codecs.codec import in_order, unflatten
from fedpara_edge.codecs.decoding import decode_all
from fedpara_edge.factors.compose import compose_named, factor_shapes, travelling
from fedpara_edge.factors.layout import LayerSpec, Layout
from fedpara_edge.factors.linearization import Array, Factors, Linearization
from fedpara_edge.formats.update import Update

STEPS = 3
ITERATIONS = 12
HALVINGS = 6


@dataclass(frozen=True, kw_only=True)
class Refit:
    """Refitted factors.

    Args:
        change: Change of the factors and the other tensors, float64 [entries].
        before: Gap ||W(mean of factors) - M||_F / ||M - W(base)||_F of all refitted layers together.
        after: Gap of the refitted factors.
    """

    change: NDArray[np.float64]
    before: float
    after: float


def refit(
    updates: Sequence[Update],
    shares: NDArray[np.float64],
    layout: Layout,
    base: Mapping[str, NDArray[np.float32]],
    mean_change: NDArray[np.float64],
) -> Refit:
    """Refit the mean change of some updates.

    Args:
        updates: Closed updates, all of them good.
        shares: Shares of the updates in the mean, float64 [updates].
        layout: Layout of the model.
        base: Shared tensors that the updates change, by name.
        mean_change: Mean of the updates' changes, float64 [entries].

    Raises:
        InvalidUpdateError: An update is gone or was changed since the mean was taken.
    """
    layers = [found for layer in layout.layers if (found := travelling(layout, layer))]
    tensors = in_order(layout.shared)
    starts = {layer.name: compose_named(layout, layer, base) for layer in layers}
    means = _mean_moves(updates, shares, layout, layers, base, starts)
    result = mean_change.copy()
    views = unflatten(tensors, result)
    moved = before = after = 0.0
    for layer in layers:
        target = starts[layer.name] + means[layer.name]
        names = {part: tensor.name for part, tensor in layout.parts(layer).items() if part in factor_shapes(layer)}
        origin = {part: np.asarray(base[name], np.float64) for part, name in names.items()}
        mean = {part: origin[part] + views[name] for part, name in names.items()}
        refitted, errors = fit(layer, mean, target)
        for part, name in names.items():
            views[name][:] = refitted[part] - origin[part]
        moved += float(np.sum(means[layer.name] ** 2))
        before, after = before + errors[0], after + errors[-1]
    return Refit(change=result, before=relative_gap(before, moved), after=relative_gap(after, moved))


def fit(
    layer: LayerSpec, factors: Factors, target: Array, *, steps: int = STEPS, iterations: int = ITERATIONS
) -> tuple[Factors, list[float]]:
    """Move the factors of one layer so that they compose to nearly `target`.

    Args:
        layer: Layer with factors.
        factors: Factors to start from, float64 by part.
        target: Weight to come near to, float64 of `layer.shape`.
        steps: Gauss-Newton steps at most.
        iterations: Conjugate gradient steps in each Gauss-Newton step.

    Returns:
        The factors, and the squared errors at the start and after each step; they never rise.
    """
    here = Linearization(layer, factors)
    errors = [float(np.sum((target - here.weight) ** 2))]
    for _ in range(steps):
        direction = _solve(here, target - here.weight, iterations)
        for halving in range(HALVINGS):
            tried = {part: factors[part] + direction[part] / 2**halving for part in factors}
            there = Linearization(layer, tried)
            error = float(np.sum((target - there.weight) ** 2))
            if error < errors[-1]:
                break
        else:
            break
        factors, here = tried, there
        errors.append(error)
    return factors, errors


def _solve(here: Linearization, residual: Array, iterations: int) -> Factors:
    """Least squares ||J δ - residual|| by CGLS from δ = 0."""
    gradient = here.pull(residual)
    solution = {part: np.zeros_like(array) for part, array in gradient.items()}
    direction, norm = gradient, _squared(gradient)
    for _ in range(iterations):
        pushed = here.push(direction)
        length = float(np.sum(pushed**2))
        if norm == 0 or length == 0:
            break
        step = norm / length
        for part in solution:
            solution[part] += step * direction[part]
        residual = residual - step * pushed
        gradient = here.pull(residual)
        norm, last = _squared(gradient), norm
        direction = {part: gradient[part] + norm / last * direction[part] for part in gradient}
    return solution


def _mean_moves(
    updates: Sequence[Update],
    shares: NDArray[np.float64],
    layout: Layout,
    layers: Sequence[LayerSpec],
    base: Mapping[str, NDArray[np.float32]],
    starts: Mapping[str, Array],
) -> dict[str, Array]:
    tensors = in_order(layout.shared)
    means = {layer.name: np.zeros(layer.shape) for layer in layers}
    for update, share in zip(updates, shares, strict=True):
        update.reopen()
        try:
            change = decode_all(update.decoder, layout.shared_parameters)
        finally:
            update.close()
        trained = {name: base[name] + view for name, view in unflatten(tensors, change).items()}
        for layer in layers:
            means[layer.name] += share * (compose_named(layout, layer, trained) - starts[layer.name])
    return means


def _squared(factors: Factors) -> float:
    return sum(float(np.sum(array**2)) for array in factors.values())
