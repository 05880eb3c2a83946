"""The noisy mean of clipped changes (`fedpara_edge.privacy`), in place of `averaging`, and what does not go with it.

All files are read twice, for the norms and for the sums. The sums are of integers, so that those of parts of a round
(`sums`) add up to the same; the noise, whose key is made of the sum, is the same for them too.

No update has any effect on how another one counts, so what is relative to the others of a round has no place here:
bounds in medians, robust rules, mixing, and the refusal of single updates for what they lead to together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.aggregation.averaging import Average, contributions_of
from fedpara_edge.aggregation.bounds import Bounds
from fedpara_edge.aggregation.columns import read_columns
from fedpara_edge.aggregation.contribution import Contribution
from fedpara_edge.aggregation.effort import Effort
from fedpara_edge.aggregation.norms import NormMeter
from fedpara_edge.aggregation.result import Accepted
from fedpara_edge.aggregation.rules.method import Method
from fedpara_edge.aggregation.stream import watch
from fedpara_edge.aggregation.sums import ModelSums
from fedpara_edge.algorithms import ServerAlgorithm, Weighting
from fedpara_edge.errors import FedparaError, InputError, InvalidUpdateError
from fedpara_edge.formats.update import Update
from fedpara_edge.formats.weights import Weights
from fedpara_edge.privacy.budget import Privacy
from fedpara_edge.privacy.mechanism import RESOLUTION, Gaussian, clipped_sum
from fedpara_edge.privacy.noise import gaussian_integers

PRIVATE_ALGORITHMS = ("fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad")
"""Server algorithms that see one mean and nothing else of a round."""


def check_private(
    *,
    algorithm: ServerAlgorithm,
    weighting: Weighting | None,
    merge: str,
    bounds: Bounds,
    method: Method,
) -> None:
    """Refuse what lets a client do more to a noisy mean than its clipped change does.

    Raises:
        InputError: One of the options is such; the key names it.
    """
    if algorithm.name not in PRIVATE_ALGORITHMS:
        raise InputError(
            f"expected {', '.join(PRIVATE_ALGORITHMS)} with privacy, found {algorithm.name}, which takes more from a "
            "round than one mean; choose one of these",
            key="algorithm",
        )
    if not method.is_plain:
        mixed = "" if method.mixing is None else f" after mixing {method.mixing.name}"
        raise InputError(
            f"expected mean with privacy, found {method.rule.name}{mixed}, by which one client moves what counts of "
            "others; leave it out",
            key="rule" if method.mixing is None else "mixing",
        )
    if weighting == "examples":
        raise InputError("expected equal with privacy, as examples tell of a client; leave it out", key="weighting")
    if merge != "mean":
        raise InputError(f"expected mean with privacy, found {merge}; leave it out", key="merge")
    usual = Bounds()
    for name in ("max_norm", "max_examples", "max_share"):
        if (found := getattr(bounds, name)) != getattr(usual, name):
            raise InputError(
                f"expected none with privacy, found {found:g}, which is relative to other clients; leave it out: clip "
                "is the bound",
                key=name,
            )


def average_privately(
    updates: Sequence[Update],
    weights: Weights,
    privacy: Privacy,
    *,
    on_progress: Callable[[int, int], None] | None,
    effort: Effort,
) -> Average:
    """Combine updates.

    Args:
        updates: Closed updates, in canonical order.
        weights: Weights that they change.
        privacy: Mechanism and what pays for it; nothing is paid while updates turn out bad.
        on_progress: Function that is called with the number of files read and of all.
        effort: Division of the work.

    Raises:
        BudgetError: Too little is left of the budget.
    """
    mechanism, tensors = privacy.mechanism, weights.layout.shared
    norms, sums = NormMeter(weights.layout, len(updates), exact=True), np.zeros(weights.layout.shared_parameters)
    refused = watch(updates, tensors, watchers=(norms,), effort=effort)
    if not refused:
        factors = mechanism.factors(norms.norms()[0])

        def add(lane: int, start: int, rows: NDArray[np.float32]) -> None:  # noqa: ARG001
            sums[start : start + rows.shape[1]] = clipped_sum(rows, factors)

        meter = NormMeter(weights.layout, len(updates))
        refused = read_columns(updates, tensors, add, meter=meter, effort=effort)
    if on_progress is not None:
        on_progress(len(updates), len(updates))
    return _released(contributions_of(updates, norms), sums, weights, privacy, refused)


def finish_privately(
    contributions: Sequence[Contribution], sums: ModelSums, weights: Weights, privacy: Privacy
) -> Average:
    """Noisy mean of the updates in exact sums, of which nothing is refused any more.

    Args:
        contributions: The updates, in canonical order.
        sums: Exact sums of their clipped changes.
        weights: Weights that they change.
        privacy: Mechanism and what pays for it.

    Raises:
        InvalidUpdateError: The sum is larger than clipped changes add up to.
        BudgetError: Too little is left of the budget.
    """
    (mean,) = sums.means
    total = np.concatenate([piece.to_float() for piece in mean.pieces])
    most = len(contributions) * privacy.mechanism.limit
    if not float(np.linalg.norm(total)) <= most:
        paths = sorted({str(each.path) for each in contributions if each.update is None})
        raise InvalidUpdateError(
            f"{', '.join(paths)}: expected a sum of {len(contributions)} clipped changes, found a larger one; have the "
            "partials made again",
            code="partial",
        )
    return _released(contributions, total, weights, privacy, {})


def _released(
    contributions: Sequence[Contribution],
    sums: NDArray[np.float64],
    weights: Weights,
    privacy: Privacy,
    refused: Mapping[int, FedparaError],
) -> Average:
    """The noisy mean of a sum of clipped changes, overwritten, once it was paid for; none if anything was refused."""
    mechanism = privacy.mechanism
    if not refused:
        content = _digest(weights, mechanism, sums)
        key = privacy.budget.spend(mechanism, content, weights.round + 1, again=privacy.again)
        sums += gaussian_integers(key, len(sums), RESOLUTION)
        sums *= mechanism.step
    share = 1 / mechanism.expected
    return Average(
        updates=[each.update for each in contributions if each.update is not None],
        means=sums[None],
        refused=refused,
        gap=None,
        weights=np.full(len(contributions), share),
        accepted=tuple(
            Accepted.of(
                each,
                share=share,
                norm_in_medians=None,
                scale=min(1.0, mechanism.clip / each.norms[0]) if each.norms[0] else 1.0,
                bounded=("clip",) if each.norms[0] > mechanism.clip else (),
            )
            for each in contributions
        ),
    )


def _digest(weights: Weights, mechanism: Gaussian, sums: NDArray[np.float64]) -> bytes:
    """SHA-256 of what decides the noisy sum: the weights before, the grid and the sum on it."""
    about = [weights.base, mechanism.name, mechanism.clip, mechanism.noise, mechanism.sampling]
    found = hashlib.sha256(json.dumps(about).encode())
    found.update(sums.data)
    return found.digest()
