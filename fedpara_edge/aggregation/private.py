"""The noisy mean of clipped changes (`fedpara_edge.privacy`), in place of `averaging`, and what does not go with it.

All files are read twice, for the norms and for the sums. No update has any effect on how another one counts, so what is
relative to the others of a round has no place here: bounds in medians, robust rules, mixing, and the refusal of single
updates for what they lead to together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.aggregation.averaging import Average
from fedpara_edge.aggregation.bounds import Bounds
from fedpara_edge.aggregation.columns import LANES, read_columns
from fedpara_edge.aggregation.effort import Effort
from fedpara_edge.aggregation.norms import NormMeter
from fedpara_edge.aggregation.result import Accepted
from fedpara_edge.aggregation.rules.method import Method
from fedpara_edge.algorithms import ServerAlgorithm, Weighting
from fedpara_edge.errors import FedparaError, InputError
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
    exact: bool,
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
    if exact:
        raise InputError("expected a single pass with privacy, found exact sums; leave it out", key="exact")
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
    norms, refused = _read_norms(updates, weights, effort)
    sums = np.zeros(weights.layout.shared_parameters)
    if not refused:
        factors = mechanism.factors(norms)

        def add(lane: int, start: int, rows: NDArray[np.float32]) -> None:  # noqa: ARG001
            sums[start : start + rows.shape[1]] = clipped_sum(rows, factors)

        meter = NormMeter(weights.layout, len(updates))
        refused = read_columns(updates, tensors, add, meter=meter, effort=effort)
    if on_progress is not None:
        on_progress(len(updates), len(updates))
    if not refused:
        content = _digest(weights, mechanism, sums)
        key = privacy.budget.spend(mechanism, content, weights.round + 1, again=privacy.again)
        sums += gaussian_integers(key, len(sums), RESOLUTION)
        sums *= mechanism.step
    share = 1 / mechanism.expected
    return Average(
        updates=updates,
        means=sums[None],
        refused=refused,
        gap=None,
        weights=np.full(len(updates), share),
        accepted=tuple(
            Accepted(
                path=update.path,
                client=update.header.client,
                examples=update.header.examples,
                steps=update.header.steps,
                metrics=update.header.metrics,
                bytes=update.file.size_bytes,
                share=share,
                norm=float(norm),
                norm_in_medians=None,
                scale=min(1.0, mechanism.clip / norm) if norm else 1.0,
                bounded=("clip",) if norm > mechanism.clip else (),
                sha256=update.file.known_sha256,
            )
            for update, norm in zip(updates, norms, strict=True)
        ),
    )


def _read_norms(
    updates: Sequence[Update], weights: Weights, effort: Effort
) -> tuple[NDArray[np.float64], dict[int, FedparaError]]:
    """Norms of the changes, float64 [updates], and the errors of those that turned out bad."""
    squares = np.zeros((LANES, len(updates)))

    def add(lane: int, start: int, rows: NDArray[np.float32]) -> None:  # noqa: ARG001
        squares[lane] += np.einsum("ij,ij->i", rows, rows, dtype=np.float64)

    meter = NormMeter(weights.layout, len(updates))
    refused = read_columns(updates, weights.layout.shared, add, meter=meter, effort=effort)
    return np.sqrt(squares.sum(axis=0)), refused


def _digest(weights: Weights, mechanism: Gaussian, sums: NDArray[np.float64]) -> bytes:
    """SHA-256 of what decides the noisy sum: the weights before, the grid and the sum on it."""
    about = [weights.base, mechanism.name, mechanism.clip, mechanism.noise, mechanism.sampling]
    found = hashlib.sha256(json.dumps(about).encode())
    found.update(sums.data)
    return found.digest()
