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

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG

import numpy as np

from fedpara_edge.aggregation.addition import add_change, find_overflowing, limit
from fedpara_edge.aggregation.bounds import Bounds
from fedpara_edge.aggregation.candidates import Candidates, Combining, Screened
from fedpara_edge.aggregation.composed import find_exploded, find_exploding
from fedpara_edge.aggregation.config import (
    Merge,
    check_exact,
    check_merge,
    check_min_updates,
    check_weighting,
    effective_weighting,
)
from fedpara_edge.aggregation.effort import USUAL, Effort
from fedpara_edge.aggregation.gate import Gate
from fedpara_edge.aggregation.result import Aggregation
from fedpara_edge.aggregation.rules.method import Method
from fedpara_edge.aggregation.stepping import take_step
from fedpara_edge.aggregation.verdicts import check_finite, diverged, find_deviating, kept_groups, too_few
from fedpara_edge.algorithms import ServerAlgorithm, Weighting
from fedpara_edge.algorithms.fedavg import FedAvgServer
from fedpara_edge.codecs.codec import not_finite
from fedpara_edge.factors.update import starting_factors
from fedpara_edge.formats.history import NO_HISTORY, History
from fedpara_edge.formats.serverstate import ServerState, state_of
from fedpara_edge.formats.weights import Weights
from fedpara_edge.privacy.budget import Privacy

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
    exact: bool = False,
    strict: bool = False,
    min_updates: int = 1,
    gate: Gate | None = None,
    privacy: Privacy | None = None,
    history: History = NO_HISTORY,
    on_progress: Callable[[int, int], None] | None = None,
    effort: Effort = USUAL,
) -> Aggregation:
    """Average update files into the next weights.

    Time is that of reading the files once, and again each time that updates turn out bad when their values are read, or
    too large. Memory is 16 bytes
    for each shared parameter and about 50 MiB, whatever the number of files; 12 more for each group that the algorithm
    keeps, and 8 for the second mean of scaffold.

    Args:
        paths: Update files, in any order; with `exact` partials as well.
        weights: Weights that the updates were trained from, as read from their file.
        algorithm: Server algorithm that moves the weights.
        state: Server state of the round before; needed after round 0 if the algorithm keeps anything.
        weighting: Weighting of the updates, by examples or equal; None for the algorithm's own.
        merge: `mean` for the mean of the factors, `refit` to bring them closer to the mean of the weights, which takes
            a second pass over the files and 12 bytes for each dense weight (`refit`).
        bounds: Bounds on what one client can do.
        method: Rule that combines the updates, for the mean.
        exact: Whether to sum without rounding, as in partials (`exact`).
        strict: Whether the first bad update, by path, ends the round instead of being left out.
        min_updates: Number of valid updates below which nothing is aggregated.
        gate: Judge of whose each update is; None to believe the names in the files.
        privacy: Noise on the mean and the budget that pays for it, in place of the bounds; None for none.
        history: Past rounds whose updates may count as well, for less (`staleness`).
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
    weights.refuse_keeping(algorithm.name, () if algorithm.restarts else algorithm.groups)
    check_exact(exact, merge, method)
    if privacy is not None:
        from fedpara_edge.aggregation.private import check_private
        from fedpara_edge.privacy.mechanism import check_layout

        check_private(algorithm=algorithm, weighting=weighting, merge=merge, bounds=bounds, method=method)
        check_layout(weights.layout)
        weighting = "equal"
    kept = kept_groups(state, weights, algorithm)
    weighting = effective_weighting(weighting, algorithm, method)
    combining = Combining(
        weights=weights,
        algorithm=algorithm,
        weighting=weighting,
        bounds=bounds,
        method=method,
        gate=gate,
        privacy=privacy,
        history=history,
        on_progress=on_progress,
        effort=effort,
    )
    files = list(map(Path, paths))
    candidates = _candidates(files, combining, exact=exact)
    while True:
        updates, rejected = candidates.updates, candidates.rejected
        rejected.sort(key=lambda update: str(update.path))
        if strict and rejected:
            raise rejected[0].error
        if len(updates) < min_updates:
            raise too_few(min_updates, len(updates), rejected)
        participation = algorithm.participation(len(updates))
        mean = candidates.average()
        refused, refitted = mean.refused or find_deviating(updates, algorithm), None
        if not refused:
            if merge == "refit":
                from fedpara_edge.aggregation.refit import refit

                with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is compared below
                    refitted = refit(mean.updates, mean.weights, weights.layout, weights.tensors, mean.means[0])
                mean.means[0] = refitted.change
            groups = take_step(algorithm, weights.layout, mean.means, kept, participation, effort=effort)
            tensors = add_change(weights, mean.means[0], effort=effort)
            is_finite = all(not_finite(each) is None for each in (tensors, *groups.values()))
            if privacy is None and not is_finite:
                largest = [algorithm.largest_change(update.header.metrics) for update in updates]
                refused = find_overflowing(mean.updates, weights, largest)
                tensors = limit(tensors) if algorithm.convex and merge == "mean" else tensors
        if not refused:
            if not is_finite:
                check_finite({"weights": tensors, **groups}, algorithm)
            exploded = bounds.binds("weights") and find_exploded(
                weights.layout, tensors, weights.tensors, effort=effort
            )
            if exploded:
                refused = find_exploding(mean.updates, weights) if privacy is None else {}
                if not refused:
                    raise diverged(exploded.expected, exploded.found, algorithm)
        if not refused:
            break
        candidates.refuse(refused)
    unused = {update.path for update in rejected} - {update.path for update in updates}
    moved = weights.moved(tensors, weights.round + 1)
    check_finite({"weights": moved.tensors}, algorithm)
    for group, values in groups.items():
        for name in starting_factors(moved.layout, moved.round):
            values[name] = np.full_like(values[name], algorithm.start(group))
    return Aggregation(
        weights=moved,
        tensors=tensors,
        state=state_of(moved, algorithm, groups) if groups else None,
        algorithm=algorithm,
        weighting=weighting,
        method=method,
        accepted=mean.accepted,
        rejected=tuple(rejected),
        rejected_bytes=sum(map(_bytes_of, unused)),
        dense_bytes=4 * weights.layout.dense_parameters * len(updates),
        gap=mean.gap,
        refit=refitted,
    )


def _bytes_of(path: Path) -> int:
    """Size of a file; 0 where there is none any more."""
    with suppress(OSError):
        status = path.stat()
        return status.st_size if S_ISREG(status.st_mode) else 0
    return 0


def _candidates(files: list[Path], combining: Combining, *, exact: bool) -> Candidates:
    """The updates that may count, read as they are or in exact sums."""
    if not exact:
        return Screened(files, combining)
    from fedpara_edge.aggregation.summed import Summed

    return Summed(files, combining)
