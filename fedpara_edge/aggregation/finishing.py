"""The mean of updates whose exact sums are known (`sums`), with the bounds of the round (`bounds`).

Bounds compare the updates of a whole round, so what they are is known only when all updates are in the sums. With n_i
the weight of an update there, s_i its share in the round and f_i the factor that bounds its norm,

    mean = (Σ_P s_i / Σ_P n_i) Σ_P n_i d_i + Σ_B s_i f_i d_i

where B are the updates that a bound binds, and P the others. The first sum is that of all updates less Σ_B n_i d_i, for
which the files of B are read again: nothing is left of what is taken away from an exact sum. In the second, the s_i are
multiples of 2^-64. So the mean depends on the updates alone, whatever their order and grouping.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.aggregation.averaging import (
    Average,
    describe,
    limits,
    respects_of,
    scaled,
    scaling_of,
)
from fedpara_edge.aggregation.bounds import Bounds
from fedpara_edge.aggregation.contribution import Contribution, factors_of
from fedpara_edge.aggregation.effort import Effort
from fedpara_edge.aggregation.exact import ExactSum
from fedpara_edge.aggregation.spread import add_spread
from fedpara_edge.aggregation.sums import (
    FRACTION_BITS,
    ModelSums,
    fixed,
    own_weights,
    weights_of,
)
from fedpara_edge.algorithms import ServerAlgorithm, Weighting
from fedpara_edge.errors import InputError
from fedpara_edge.formats.update import Update
from fedpara_edge.formats.weights import Weights

FRACTION = 2.0**-FRACTION_BITS
NAMED = 5
"""Clients that a message names before it counts the others."""


def finish(
    contributions: Sequence[Contribution],
    sums: ModelSums,
    weights: Weights,
    algorithm: ServerAlgorithm,
    *,
    weighting: Weighting,
    bounds: Bounds,
    effort: Effort,
) -> Average:
    """Mean of the updates in exact sums.

    Args:
        contributions: The updates, in canonical order.
        sums: Exact sums of the updates, which are used up.
        weights: Weights that they change.
        algorithm: Server algorithm, which says what means it needs.
        weighting: Weighting of the updates in the sums.
        bounds: Bounds on each of them.
        effort: Division of the work.

    Raises:
        InputError: A bound binds an update whose file is not there.
        InvalidUpdateError: Such a file was changed.
    """
    headers = [each.header for each in contributions]
    factors = factors_of(headers, algorithm)
    respects = respects_of(contributions, factors)
    scaling = scaling_of(respects, bounds)
    shares = bounds.shares([header.examples for header in headers], weighting)
    limited = limits(headers, shares, weighting, bounds)
    bound = [k for k in range(len(headers)) if limited[k] or (scaling[:, k] < 1).any()]
    updates = remove(
        [contributions[k] for k in bound], sums, algorithm, weighting, reason="a bound binds them", effort=effort
    )
    counting = scaled(updates, scaling[:, bound], weights.layout)
    apart = ModelSums(weights.layout, algorithm)
    apart.add_good(counting, weights_of([fixed(shares[k]) for k in bound], factors[:, bound]), effort=effort)
    free = sorted(set(range(len(headers))) - set(bound))
    counts = own_weights([headers[k] for k in free], algorithm, weighting)[0]
    means, squares = _combined(sums, apart, math.fsum(shares[free]) / sum(counts) if free else 0.0)
    add_spread(weights.layout, squares, means[0], weights.tensors)
    replaced = dict(zip(bound, counting, strict=True))
    taken = [replaced.get(k, each.update) for k, each in enumerate(contributions)]
    return Average(
        updates=[update for update in taken if update is not None],
        means=means,
        refused={},
        gap=None,
        weights=shares,
        accepted=describe(contributions, shares, scaling, respects, limited, number=weights.round),
    )


def remove(
    contributions: Sequence[Contribution],
    sums: ModelSums,
    algorithm: ServerAlgorithm,
    weighting: Weighting,
    *,
    reason: str,
    effort: Effort,
) -> list[Update]:
    """Take updates away from sums that they are in; they themselves.

    Args:
        contributions: The updates.
        sums: Sums.
        algorithm: Server algorithm.
        weighting: Weighting of the updates in the sums.
        reason: Reason for which they are taken away, to follow "as" in a message.
        effort: Division of the work.

    Raises:
        InputError: The file of one is not there.
        InvalidUpdateError: The file of one was changed.
    """
    missing = [each for each in contributions if each.update is None]
    if missing:
        clients = ", ".join(repr(each.header.client) for each in missing[:NAMED])
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        raise InputError(
            f"{missing[0].path}: expected the updates of clients {clients}{more} beside the partials, as {reason}, "
            f"found none with SHA-256 {str(missing[0].sha256)[:12]}…; give these update files as well"
        )
    headers = [each.header for each in contributions]
    updates = [each.update for each in contributions if each.update is not None]
    weights = [[-weight for weight in row] for row in own_weights(headers, algorithm, weighting)]
    sums.add_good(updates, weights, effort=effort)
    return updates


def _combined(sums: ModelSums, apart: ModelSums, unit: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means, float64 [means, entries], and the mean squares of running means, from the sums of free and bound updates.

    Each piece of the sums is given up when it was read, so that the means take their place in memory.
    """
    means = np.empty((len(sums.means), sums.layout.shared_parameters))
    for mean, free, bound in zip(means, sums.means, apart.means, strict=True):
        for number, (start, stop) in enumerate(free.ranges):
            mean[start:stop] = free.pieces[number].to_float() * unit + bound.pieces[number].to_float() * FRACTION
            free.pieces[number] = bound.pieces[number] = ExactSum(0)
    means[1:] *= FRACTION
    return means, sums.squares.pieces[0].to_float() * unit + apart.squares.pieces[0].to_float() * FRACTION
