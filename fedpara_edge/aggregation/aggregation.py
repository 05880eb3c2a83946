"""The mean of updates and the next global weights: of the factors, by FedAvg or another server algorithm.

    w ← base + step(Σ_i s_i change_i),    s_i = examples_i / Σ_j examples_j  or  1 / updates

in steps with a module each: `screening` compares the headers, `bounds` says how much one client can do, `averaging` and
`stream` average the values or have a robust rule (`rules`) combine them, `stepping` has the algorithm (`algorithms`)
make a movement of the mean, `addition` adds it to the weights, `composed` looks at what these compose to, and `gap`
watches the values for the distance between the mean of the factors and the mean of the weights, which `refit` lowers if
asked to.

Running statistics are averaged as those of a mixture (`spread`), whatever the algorithm.
Source: FedPara (arXiv 2108.06098v3), section 2.3, where the server averages the factors themselves.

The result does not depend on the order of the files, to the last bit, and is the same as that of the accepted updates
alone: what was refused leaves no trace in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.aggregation.addition import add_change, find_overflowing, limit
from fedpara_edge.aggregation.averaging import average
from fedpara_edge.aggregation.bounds import Bounds
from fedpara_edge.aggregation.composed import find_exploded, find_exploding
from fedpara_edge.aggregation.config import Merge, check_merge, check_min_updates, check_weighting, effective_weighting
from fedpara_edge.aggregation.effort import USUAL, Effort
from fedpara_edge.aggregation.gate import Gate
from fedpara_edge.aggregation.private import Privacy, average_privately, check_layout, check_private
from fedpara_edge.aggregation.refit import refit
from fedpara_edge.aggregation.result import Aggregation
from fedpara_edge.aggregation.rules.method import Method
from fedpara_edge.aggregation.screening import Rejected, screen
from fedpara_edge.aggregation.stepping import take_step
from fedpara_edge.algorithms import ServerAlgorithm, Weighting
from fedpara_edge.algorithms.fedavg import FedAvgServer
from fedpara_edge.codecs.codec import not_finite
from fedpara_edge.errors import DivergedError, FedparaError, InputError, InvalidUpdateError, TooFewUpdatesError
from fedpara_edge.formats.serverstate import ServerState, state_of
from fedpara_edge.formats.update import Update
from fedpara_edge.formats.weights import Weights

FEDAVG = FedAvgServer()
DEFAULT_BOUNDS = Bounds()
MEAN = Method()


def aggregate(
    paths: Iterable[Path | str],
    weights: Weights,
    *,
    algorithm: ServerAlgorithm = FEDAVG,
    state: ServerState | None = None,
    weighting: Weighting | None = None,
    merge: Merge = "mean",
    bounds: Bounds = DEFAULT_BOUNDS,
    method: Method = MEAN,
    strict: bool = False,
    min_updates: int = 1,
    gate: Gate | None = None,
    privacy: Privacy | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    effort: Effort = USUAL,
) -> Aggregation:
    """Average update files into the next weights.

    Time is that of reading the files once, and again each time that updates turn out bad when their values are read, or
    too large. Memory is 16 bytes
    for each shared parameter and about 50 MiB, whatever the number of files; 12 more for each group that the algorithm
    keeps, and 8 for the second mean of scaffold.

    Args:
        paths: Update files, in any order.
        weights: Weights that the updates were trained from, as read from their file.
        algorithm: Server algorithm that moves the weights.
        state: Server state of the round before; needed after round 0 if the algorithm keeps anything.
        weighting: Weighting of the updates, by examples or equal; None for the algorithm's own.
        merge: `mean` for the mean of the factors, `refit` to bring them closer to the mean of the weights, which takes
            a second pass over the files and 12 bytes for each dense weight (`refit`).
        bounds: Bounds on what one client can do.
        method: Rule that combines the updates, for the mean.
        strict: Whether the first bad update, by path, ends the round instead of being left out.
        min_updates: Number of valid updates below which nothing is aggregated.
        gate: Judge of whose each update is; None to believe the names in the files.
        privacy: Noise on the mean and the budget that pays for it, in place of the bounds; None for none.
        on_progress: Function that is called now and then with the number of files read and of all to read; it starts
            again if the files must be read twice.
        effort: Division of the work into blocks, threads and pieces.

    Raises:
        TooFewUpdatesError: There are fewer valid updates than `min_updates`; its `rejected` tells of the others.
        InputError: `min_updates` is less than 1, the algorithm takes no refit or keeps what has no meaning for updates
            of weights, the state is missing or another algorithm's, or there are more updates than clients.
        WrongBundleError: The state belongs with other weights.
        BudgetError: The round would take more than what is left of the privacy budget.
        DivergedError: The step leads beyond float32 or to exploding weights, and no single update is to blame.
        InvalidUpdateError, TrustError, WrongBundleError: An update is bad, with `strict`.
    """
    check_min_updates(min_updates)
    check_merge(merge, algorithm, method)
    check_weighting(weighting, method)
    weights.refuse_keeping(algorithm.name, algorithm.groups)
    if privacy is not None:
        check_private(algorithm=algorithm, weighting=weighting, merge=merge, bounds=bounds, method=method)
        check_layout(weights)
        weighting = "equal"
    kept = _kept(state, weights, algorithm)
    weighting = effective_weighting(weighting, algorithm, method)
    updates, rejected = screen(map(Path, paths), weights, algorithm, gate)
    while True:
        rejected.sort(key=lambda update: str(update.path))
        if strict and rejected:
            raise rejected[0].error
        if len(updates) < min_updates:
            raise _too_few(min_updates, len(updates), rejected)
        participation = algorithm.participation(len(updates))
        if privacy is not None:
            mean = average_privately(updates, weights, privacy, on_progress=on_progress, effort=effort)
        else:
            mean = average(
                updates,
                weights,
                algorithm,
                weighting=weighting,
                bounds=bounds,
                method=method,
                on_progress=on_progress,
                effort=effort,
            )
        refused, refitted = mean.refused or _find_deviating(updates, algorithm), None
        if not refused:
            if merge == "refit":
                with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is compared below
                    refitted = refit(mean.updates, mean.weights, weights.layout, weights.tensors, mean.means[0])
                mean.means[0] = refitted.change
            groups = take_step(
                algorithm, weights.layout, mean.means, kept, participation, piece_entries=effort.piece_entries
            )
            tensors = add_change(weights, mean.means[0])
            if privacy is None and any(not_finite(each) is not None for each in (tensors, *groups.values())):
                largest = [algorithm.largest_change(update.header.metrics) for update in updates]
                refused = find_overflowing(mean.updates, weights, largest)
                tensors = limit(tensors) if algorithm.convex and merge == "mean" else tensors
        if not refused:
            _check_finite({"weights": tensors, **groups}, algorithm)
            if bounds.binds("weights") and (found := find_exploded(weights.layout, tensors, weights.tensors)):
                refused = find_exploding(mean.updates, weights) if privacy is None else {}
                if not refused:
                    raise _diverged(found.expected, found.found, algorithm)
        if not refused:
            break
        rejected += [Rejected(updates[n].path, updates[n].header.client, error) for n, error in refused.items()]
        updates = [update for number, update in enumerate(updates) if number not in refused]
    unused = {update.path for update in rejected} - {update.path for update in updates}
    moved = weights.moved(tensors, weights.round + 1)
    _check_finite({"weights": moved.tensors}, algorithm)
    return Aggregation(
        weights=moved,
        tensors=tensors,
        state=state_of(moved, algorithm, groups) if groups else None,
        algorithm=algorithm,
        weighting=weighting,
        method=method,
        accepted=mean.accepted,
        rejected=tuple(rejected),
        rejected_bytes=sum(path.stat().st_size for path in unused if path.is_file()),
        dense_bytes=4 * weights.layout.dense_parameters * len(updates),
        gap=mean.gap,
        refit=refitted,
    )


def _kept(
    state: ServerState | None, weights: Weights, algorithm: ServerAlgorithm
) -> Mapping[str, Mapping[str, NDArray[np.float32]]]:
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


def _find_deviating(updates: Sequence[Update], algorithm: ServerAlgorithm) -> dict[int, FedparaError]:
    headers = [update.header for update in updates]
    found = algorithm.find_deviating([header.metrics for header in headers], [header.steps for header in headers])
    remedy = "train with the rate of the round, or leave the device out"
    return {
        number: InvalidUpdateError(f"{updates[number].path}: {reason}; {remedy}", code="metrics")
        for number, reason in found.items()
    }


def _check_finite(groups: Mapping[str, Mapping[str, NDArray[np.float32]]], algorithm: ServerAlgorithm) -> None:
    for group, tensors in groups.items():
        if (bad := not_finite(tensors)) is not None:
            raise _diverged(f"tensor {bad!r}: expected finite {group}", "one beyond float32", algorithm)


def _diverged(expected: str, found: str, algorithm: ServerAlgorithm) -> DivergedError:
    return DivergedError(
        f"{expected} after the step of algorithm {algorithm.name}, found {found}; lower the server's lr, or begin "
        "again from an earlier round"
    )


def _too_few(expected: int, found: int, rejected: Sequence[Rejected]) -> TooFewUpdatesError:
    message = f"expected at least {expected} valid update{'s' * (expected > 1)}, found {found}"
    if rejected:
        codes = Counter(update.code for update in rejected)
        counts = ", ".join(f"{count} {code}" for code, count in sorted(codes.items()))
        message += f"; refused {len(rejected)} ({counts}), the first: {rejected[0].reason}"
    return TooFewUpdatesError(message, rejected=[update.error for update in rejected])
