"""The mean of updates and the next global weights: of the factors, by FedAvg or another server algorithm.

    w ← base + step(Σ_i s_i change_i),    s_i = examples_i / Σ_j examples_j  or  1 / updates

in steps with a module each: `screening` compares the headers, `stream` averages the values, `stepping` has the
algorithm (`algorithms`) make a movement of the mean, `addition` adds it to the weights, and `gap` watches the
values for the distance between the mean of the factors and the mean of the weights, which `refit` lowers if asked to.
Running statistics are averaged as those of a mixture (`spread`), whatever the algorithm.
Source: FedPara (arXiv 2108.06098v3), section 2.3, where the server averages the factors themselves.

The result does not depend on the order of the files, to the last bit, and is the same as that of the accepted updates
alone: what was refused leaves no trace in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.aggregation.addition import add_change, find_overflowing, limit
from fedpara_edge.aggregation.config import Merge, check_merge, check_min_updates
from fedpara_edge.aggregation.effort import USUAL, Effort
from fedpara_edge.aggregation.gap import Gap, GapEstimator, finite
from fedpara_edge.aggregation.refit import Refit, refit
from fedpara_edge.aggregation.screening import Rejected, screen
from fedpara_edge.aggregation.spread import SpreadOfMeans
from fedpara_edge.aggregation.stepping import take_step
from fedpara_edge.aggregation.stream import stream_mean
from fedpara_edge.algorithms import ServerAlgorithm, Weighting
from fedpara_edge.algorithms.fedavg import FedAvgServer
from fedpara_edge.codecs.codec import not_finite
from fedpara_edge.errors import DivergedError, InputError, TooFewUpdatesError
from fedpara_edge.formats.serverstate import ServerState, state_of
from fedpara_edge.formats.update import Update
from fedpara_edge.formats.weights import Weights


@dataclass(frozen=True)
class Accepted:
    """An update that is in the mean.

    Args:
        path: The file.
        client: Name of the client, from the header as what follows.
        examples: Number of examples it was trained on.
        steps: Number of steps it took.
        metrics: Numbers that it states.
        bytes: Size of the file.
    """

    path: Path
    client: str
    examples: int
    steps: int
    metrics: Mapping[str, float]
    bytes: int

    @classmethod
    def of(cls, update: Update) -> Accepted:
        """The facts about an open or closed update."""
        header = update.header
        return cls(update.path, header.client, header.examples, header.steps, header.metrics, update.file.size_bytes)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`."""
        return {**vars(self), "path": str(self.path), "metrics": dict(self.metrics)}


@dataclass(frozen=True, kw_only=True)
class Aggregation:
    """The next weights, and how they came about.

    Args:
        weights: Weights of the next round.
        state: Server state for the next round; None if the algorithm keeps nothing.
        algorithm: Server algorithm.
        weighting: Weighting of the updates.
        accepted: Updates in the mean, sorted by client.
        rejected: Updates that were refused, sorted by path.
        rejected_bytes: Size of the refused files, received for nothing.
        dense_bytes: Size of as many updates of the dense model as were accepted, in float32.
        gap: Distance of the mean of the factors from that of the weights; None if no layer has factors that travel.
        refit: Gap before and after refitting; None if that was not asked for.
    """

    weights: Weights
    state: ServerState | None
    algorithm: ServerAlgorithm
    weighting: Weighting
    accepted: tuple[Accepted, ...]
    rejected: tuple[Rejected, ...]
    rejected_bytes: int
    dense_bytes: int
    gap: Gap | None
    refit: Refit | None

    @property
    def received_bytes(self) -> int:
        """Size of all accepted files."""
        return sum(update.bytes for update in self.accepted)

    @property
    def share(self) -> float:
        """Received bytes over those of the dense model."""
        return self.received_bytes / self.dense_bytes

    def to_json(self) -> dict[str, Any]:
        """All but the tensors, plain data for `json.dumps`."""
        return {
            "fingerprint": self.weights.fingerprint,
            "round": self.weights.round,
            "algorithm": self.algorithm.to_json(),
            "weighting": self.weighting,
            "examples": sum(update.examples for update in self.accepted),
            "accepted": [update.to_json() for update in self.accepted],
            "rejected": [update.to_json() for update in self.rejected],
            "received_bytes": self.received_bytes,
            "rejected_bytes": self.rejected_bytes,
            "dense_bytes": self.dense_bytes,
            "share": self.share,
            "gap": None if self.gap is None else self.gap.to_json(),
            "refit": None
            if self.refit is None
            else {"before": finite(self.refit.before), "after": finite(self.refit.after)},
        }


FEDAVG = FedAvgServer()


def aggregate(
    paths: Iterable[Path | str],
    weights: Weights,
    *,
    algorithm: ServerAlgorithm = FEDAVG,
    state: ServerState | None = None,
    weighting: Weighting | None = None,
    merge: Merge = "mean",
    strict: bool = False,
    min_updates: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
    effort: Effort = USUAL,
) -> Aggregation:
    """Average update files into the next weights.

    Time is that of reading the files once, twice if one turns out bad only when its values are read. Memory is 16 bytes
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
        strict: Whether the first bad update, by path, ends the round instead of being left out.
        min_updates: Number of valid updates below which nothing is aggregated.
        on_progress: Function that is called now and then with the number of files read and of all to read; it starts
            again if the files must be read twice.
        effort: Division of the work into blocks, threads and pieces.

    Raises:
        TooFewUpdatesError: There are fewer valid updates than `min_updates`; its `rejected` tells of the others.
        InputError: `min_updates` is less than 1, the algorithm takes no refit, the state is missing or another
            algorithm's, or there are more updates than clients.
        WrongBundleError: The state belongs with other weights.
        DivergedError: The step leads beyond float32, and no single update is to blame.
        InvalidUpdateError, WrongBundleError: An update is bad, with `strict`.
    """
    check_min_updates(min_updates)
    check_merge(merge, algorithm)
    kept = _kept(state, weights, algorithm)
    weighting = weighting or algorithm.weighting
    updates, rejected = screen(map(Path, paths), weights, algorithm)
    while True:
        rejected.sort(key=lambda update: str(update.path))
        if strict and rejected:
            raise rejected[0].error
        if len(updates) < min_updates:
            raise _too_few(min_updates, len(updates), rejected)
        participation = algorithm.participation(len(updates))
        shares = algorithm.shares(_weigh(updates, weighting), [update.header.metrics for update in updates])
        gap = GapEstimator(weights.layout, weights.tensors, updates=len(updates))
        spread = SpreadOfMeans(weights.layout)
        streamed = stream_mean(
            updates,
            weights.layout.shared,
            shares=shares,
            watchers=(gap, spread),
            on_progress=on_progress,
            effort=effort,
        )
        spread.add_to(streamed.means[0], weights.tensors)
        measured = gap.result(streamed.means[0])
        refused, refitted = streamed.refused, None
        if not refused:
            if merge == "refit":
                with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is compared below
                    refitted = refit(updates, shares[0], weights.layout, weights.tensors, streamed.means[0])
                streamed.means[0] = refitted.change
            groups = take_step(
                algorithm, weights.layout, streamed.means, kept, participation, piece_entries=effort.piece_entries
            )
            tensors = add_change(weights.tensors, streamed.means[0])
            if any(not_finite(each) is not None for each in (tensors, *groups.values())):
                largest = [algorithm.largest_change(update.header.metrics) for update in updates]
                refused = find_overflowing(updates, weights, largest)
                tensors = limit(tensors) if algorithm.convex and merge == "mean" else tensors
        if not refused:
            break
        rejected += [Rejected(updates[n].path, updates[n].header.client, error) for n, error in refused.items()]
        updates = [update for number, update in enumerate(updates) if number not in refused]
    _check_finite({"weights": tensors, **groups}, algorithm)
    unused = {update.path for update in rejected} - {update.path for update in updates}
    moved = Weights(weights.fingerprint, weights.round + 1, weights.layout, tensors)
    return Aggregation(
        weights=moved,
        state=state_of(moved, algorithm, groups) if groups else None,
        algorithm=algorithm,
        weighting=weighting,
        accepted=tuple(map(Accepted.of, updates)),
        rejected=tuple(rejected),
        rejected_bytes=sum(path.stat().st_size for path in unused if path.is_file()),
        dense_bytes=4 * weights.layout.dense_parameters * len(updates),
        gap=measured,
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


def _weigh(updates: Sequence[Update], weighting: Weighting) -> NDArray[np.float64]:
    if weighting == "equal":
        return np.full(len(updates), 1 / len(updates))
    examples = sum(update.header.examples for update in updates)
    return np.array([update.header.examples / examples for update in updates])


def _check_finite(groups: Mapping[str, Mapping[str, NDArray[np.float32]]], algorithm: ServerAlgorithm) -> None:
    for group, tensors in groups.items():
        if (bad := not_finite(tensors)) is not None:
            raise DivergedError(
                f"tensor {bad!r}: expected finite {group} after the step of algorithm {algorithm.name}, found one "
                "beyond float32; lower the server's lr, or begin again from an earlier round"
            )


def _too_few(expected: int, found: int, rejected: Sequence[Rejected]) -> TooFewUpdatesError:
    message = f"expected at least {expected} valid update{'s' * (expected > 1)}, found {found}"
    if rejected:
        codes = Counter(update.code for update in rejected)
        counts = ", ".join(f"{count} {code}" for code, count in sorted(codes.items()))
        message += f"; refused {len(rejected)} ({counts}), the first: {rejected[0].reason}"
    return TooFewUpdatesError(message, rejected=[update.error for update in rejected])
