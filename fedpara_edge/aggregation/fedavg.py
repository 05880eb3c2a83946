"""The mean of updates, weighted by their examples, and the next global weights (FedAvg on the factors).

    w ← base + Σ_i (examples_i / Σ_j examples_j) change_i

in steps with a module each: `screening` compares the headers, `stream` averages the values, `addition` adds them to the
weights, and `gap` watches them for the distance between the mean of the factors and the mean of the weights. Source:
FedPara (arXiv 2108.06098v3), section 2.3, where the server averages the factors themselves.

The result does not depend on the order of the files, to the last bit, and is the same as that of the accepted updates
alone: what was refused leaves no trace in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpara_edge.aggregation.addition import add_change, find_overflowing, is_finite, limit
from fedpara_edge.aggregation.gap import Gap, GapEstimator
from fedpara_edge.aggregation.screening import Rejected, screen
from fedpara_edge.aggregation.stream import StreamedMean, stream_mean
from fedpara_edge.errors import InputError, TooFewUpdatesError
from fedpara_edge.update import Update
from fedpara_edge.weights import Weights


@dataclass(frozen=True)
class Accepted:
    """An update that is in the mean; the fields are those of its header, and `bytes` the size of the file."""

    path: Path
    client: str
    examples: int
    steps: int
    metrics: Mapping[str, float]
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`."""
        return {**vars(self), "path": str(self.path), "metrics": dict(self.metrics)}


@dataclass(frozen=True, kw_only=True)
class Aggregation:
    """The next weights, and how they came about.

    Args:
        weights: of the next round.
        accepted: the updates in the mean, sorted by client.
        rejected: the others, sorted by path.
        rejected_bytes: size of the files that were rejected: received, too, and of no use.
        dense_bytes: what as many updates of the dense model as were accepted cost in float32.
        gap: between the mean of the factors and that of the weights; None if no layer has factors that travel.
    """

    weights: Weights
    accepted: tuple[Accepted, ...]
    rejected: tuple[Rejected, ...]
    rejected_bytes: int
    dense_bytes: int
    gap: Gap | None

    @property
    def received_bytes(self) -> int:
        """Size of all accepted files."""
        return sum(update.bytes for update in self.accepted)

    @property
    def share(self) -> float:
        """Received bytes over those of the dense model."""
        return self.received_bytes / self.dense_bytes

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`: all but the tensors."""
        return {
            "fingerprint": self.weights.fingerprint,
            "round": self.weights.round,
            "examples": sum(update.examples for update in self.accepted),
            "accepted": [update.to_json() for update in self.accepted],
            "rejected": [update.to_json() for update in self.rejected],
            "received_bytes": self.received_bytes,
            "rejected_bytes": self.rejected_bytes,
            "dense_bytes": self.dense_bytes,
            "share": self.share,
            "gap": None if self.gap is None else self.gap.to_json(),
        }


def aggregate(
    paths: Iterable[Path],
    weights: Weights,
    *,
    strict: bool = False,
    min_updates: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> Aggregation:
    """Average update files into the next weights.

    Time is that of reading the files once, twice if one turns out bad only when its values are read. Memory is 16 bytes
    for each shared parameter and about 50 MiB, whatever the number of files.

    Args:
        paths: update files, in any order.
        weights: those the updates were trained from, as read from their file.
        strict: raise the error of the first bad update, by path, instead of leaving it out.
        min_updates: how many valid ones there must be.
        on_progress: called now and then with the number of files read and of all files to read; it starts again if
            the files must be read twice.

    Raises:
        TooFewUpdatesError: there are fewer valid updates than `min_updates`; its `rejected` tells of the others.
        InputError: `min_updates` is less than 1.
        InvalidUpdateError, WrongBundleError: with `strict`.
    """
    if min_updates < 1:
        raise InputError(f"min_updates: expected at least 1, found {min_updates}")
    updates, rejected = screen(paths, weights)
    while True:
        rejected.sort(key=lambda update: str(update.path))
        if strict and rejected:
            raise rejected[0].error
        if len(updates) < min_updates:
            raise _too_few(min_updates, len(updates), rejected)
        mean, gap = _average(updates, weights, on_progress)
        tensors = add_change(weights.tensors, mean.change)
        refused = mean.refused
        if not refused and not is_finite(tensors):
            refused = find_overflowing(updates, weights)
            tensors = limit(tensors)
        if not refused:
            break
        rejected += [Rejected(updates[n].path, updates[n].header.client, error) for n, error in refused.items()]
        updates = [update for number, update in enumerate(updates) if number not in refused]
    return Aggregation(
        weights=Weights(weights.fingerprint, weights.round + 1, weights.layout, tensors),
        accepted=tuple(map(_accept, updates)),
        rejected=tuple(rejected),
        rejected_bytes=_file_bytes({r.path for r in rejected} - {update.path for update in updates}),
        dense_bytes=4 * weights.layout.dense_parameters * len(updates),
        gap=gap,
    )


def _average(
    updates: Sequence[Update], weights: Weights, on_progress: Callable[[int, int], None] | None
) -> tuple[StreamedMean, Gap | None]:
    estimator = GapEstimator(weights.layout, weights.tensors, updates=len(updates))
    mean = stream_mean(updates, weights.layout.shared, watcher=estimator, on_progress=on_progress)
    return mean, estimator.result(mean.change)


def _file_bytes(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())


def _accept(update: Update) -> Accepted:
    header = update.header
    return Accepted(update.path, header.client, header.examples, header.steps, header.metrics, update.file.size_bytes)


def _too_few(expected: int, found: int, rejected: Sequence[Rejected]) -> TooFewUpdatesError:
    message = f"expected at least {expected} valid update{'s' * (expected > 1)}, found {found}"
    if rejected:
        codes = Counter(update.code for update in rejected)
        counts = ", ".join(f"{count} {code}" for code, count in sorted(codes.items()))
        message += f"; refused {len(rejected)} ({counts}), the first: {rejected[0].reason}"
    return TooFewUpdatesError(message, rejected=[update.error for update in rejected])
