"""Verdicts on a round as a whole: what is missing for it, who is out of line, and where it led."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.aggregation.contribution import Contribution
from fedpara_edge.aggregation.screening import Rejected
from fedpara_edge.algorithms import ServerAlgorithm
from fedpara_edge.codecs.codec import not_finite
from fedpara_edge.errors import DivergedError, FedparaError, InputError, InvalidUpdateError, TooFewUpdatesError, counted
from fedpara_edge.formats.serverstate import ServerState
from fedpara_edge.formats.update import Update
from fedpara_edge.formats.weights import Weights


def kept_groups(
    state: ServerState | None, weights: Weights, algorithm: ServerAlgorithm
) -> Mapping[str, Mapping[str, NDArray[np.float32]]]:
    """What an algorithm kept after the round before; empty before the first.

    Raises:
        InputError: The state is missing or another algorithm's.
        WrongBundleError: The state belongs with other weights.
    """
    if state is None:
        if algorithm.groups and weights.round:
            raise InputError(
                f"algorithm {algorithm.name}: expected the server state of round {weights.round}, found none; "
                "give the state of the rounds before, or begin again from round 0"
            )
        return {}
    state.check_weights(weights)
    state.check_algorithm(algorithm)
    return state.groups


def find_deviating(
    updates: Sequence[Update] | Sequence[Contribution], algorithm: ServerAlgorithm
) -> dict[int, FedparaError]:
    """The errors of updates whose metrics can't be right beside those of the others, by number."""
    headers = [update.header for update in updates]
    found = algorithm.find_deviating([header.metrics for header in headers], [header.steps for header in headers])
    remedy = "train with the rate of the round, or leave the device out"
    return {
        number: InvalidUpdateError(f"{updates[number].path}: {reason}; {remedy}", code="metrics")
        for number, reason in found.items()
    }


def check_finite(groups: Mapping[str, Mapping[str, NDArray[np.float32]]], algorithm: ServerAlgorithm) -> None:
    """Refuse tensors with NaN or infinity.

    Raises:
        DivergedError: One has some.
    """
    for group, tensors in groups.items():
        if (bad := not_finite(tensors)) is not None:
            raise diverged(f"tensor {bad!r}: expected finite {group}", "one beyond float32", algorithm)


def diverged(expected: str, found: str, algorithm: ServerAlgorithm) -> DivergedError:
    """The error of a step that led too far."""
    return DivergedError(
        f"{expected} after the step of algorithm {algorithm.name}, found {found}; lower the server's lr, or begin "
        "again from an earlier round"
    )


def too_few(expected: int, found: int, rejected: Sequence[Rejected]) -> TooFewUpdatesError:
    """The error of a round with fewer valid updates than asked for."""
    message = f"expected at least {counted(expected, 'valid update')}, found {found}"
    if rejected:
        codes = Counter(update.code for update in rejected)
        counts = ", ".join(f"{count} {code}" for code, count in sorted(codes.items()))
        message += f"; refused {len(rejected)} ({counts}), the first: {rejected[0].reason}"
    return TooFewUpdatesError(message, rejected=[update.error for update in rejected])
