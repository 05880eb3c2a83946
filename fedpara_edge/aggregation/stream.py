"""Weighted means of any number of updates, in one pass over the files.

Updates are read in blocks (`Effort.block_files`), and a block in the chunks that codecs decode (`codecs.codec`): each
is decoded into one float32 matrix that stays in the cache, its weighted sum (`codecs.changes`) is the block's part of a
mean, and the parts are added up in float64. So no more files than those of a block are open, and memory holds one
float64 copy of the model for each mean and some 20 MiB, however many updates there are.

Accuracy: with u = 2^-24, each entry of the mean is off by at most (block_files + 1) u Σ w_i |d_i|. Rounding the new
weights to float32 costs up to u |weight|, which is more wherever a weight is much larger than its change. The last bits
depend on the order of the updates, so the caller sorts them.

Two threads, as reading and multiplying are both bound by one core (`benchmarks/aggregation.py` times the whole). Pieces
are independent, so the number of threads changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.aggregation.effort import USUAL, Effort
from fedpara_edge.codecs.changes import Changes
from fedpara_edge.codecs.codec import chunks, in_order, name_at
from fedpara_edge.codecs.decoding import decode_rows
from fedpara_edge.codecs.scratch import Scratch, scratch
from fedpara_edge.errors import FedparaError, InvalidUpdateError, TrustError
from fedpara_edge.factors.layout import TensorSpec
from fedpara_edge.formats.update import Update


class Watcher(Protocol):
    """An observer of every decoded value on its way into the mean."""

    def start_block(self, files: int) -> None:
        """Prepare for the pieces of a block of `files` updates."""
        ...

    def collect(self, start: int, changes: Changes) -> None:
        """Take a piece of the flat changes of the block's files, from entry `start` on; called by any thread."""
        ...

    def finish_block(self, shares: NDArray[np.float64], thread: int, threads: int) -> None:
        """Do one thread's part of the work on a block whose pieces were all collected.

        Args:
            shares: Shares of the block's files in the first mean, float64 [files].
            thread: Number of the thread.
            threads: Number of threads, each of which calls this once.
        """
        ...


class EntryWatcher:
    """A `Watcher` that gathers the changes of some entries; what is done with a block of them is its subclass's part.

    Args:
        positions: Positions of the entries in a flat change, ascending.
    """

    def __init__(self, positions: NDArray[np.int64]) -> None:
        self._positions = positions
        self._changes = np.empty((0, len(positions)), np.float32)

    def start_block(self, files: int) -> None:
        """Make room for the entries of `files` updates."""
        if len(self._changes) < files:
            self._changes = np.empty((files, len(self._positions)), np.float32)

    def collect(self, start: int, changes: Changes) -> None:
        """Keep the entries that are in a piece of the flat changes, from entry `start` on."""
        updates, entries = changes.shape
        first, last = np.searchsorted(self._positions, (start, start + entries))
        if first < last:
            self._changes[:updates, first:last] = changes.at(self._positions[first:last] - start)


@dataclass(frozen=True)
class StreamedMean:
    """The result of one pass over the updates.

    Args:
        means: Mean changes, float64 [means, entries]; meaningless if anything was
            refused.
        refused: Errors of the updates that turned out bad while they were read, by their number.
    """

    means: NDArray[np.float64]
    refused: Mapping[int, FedparaError]


def stream_mean(
    updates: Sequence[Update],
    tensors: Sequence[TensorSpec],
    *,
    shares: NDArray[np.float64],
    watchers: Sequence[Watcher] = (),
    on_progress: Callable[[int, int], None] | None = None,
    effort: Effort = USUAL,
) -> StreamedMean:
    """Mean changes of `updates`.

    A bad update does not end the pass, so that all of them are known after it.

    Args:
        updates: Closed updates, in canonical order.
        tensors: Shared tensors.
        shares: Shares of the updates in each mean, float64 [means, updates].
        watchers: Observers of the values as they pass.
        on_progress: Function that is called with the number of files read and of all files after every block.
        effort: Size of a block, and number of threads.
    """
    tensors = in_order(tensors)
    means = np.zeros((len(shares), sum(tensor.size for tensor in tensors)))
    failures: dict[int, Failure] = {}
    lanes = [Scratch() for _ in range(effort.threads)]
    with ThreadPoolExecutor(effort.threads) as pool:
        for first in range(0, len(updates), effort.block_files):
            last = min(first + effort.block_files, len(updates))
            block = _Block(updates[first:last], tensors, shares[:, first:last], means, lanes, watchers)
            for number, failure in block.run(pool).items():
                failures[first + number] = failure
            if on_progress is not None:
                on_progress(last, len(updates))
    return StreamedMean(means, {number: failure.error for number, failure in failures.items()})


def watch(
    updates: Sequence[Update],
    tensors: Sequence[TensorSpec],
    *,
    watchers: Sequence[Watcher],
    on_progress: Callable[[int, int], None] | None = None,
    effort: Effort = USUAL,
) -> Mapping[int, FedparaError]:
    """Show every value of `updates` to observers, where nobody needs a mean; the errors of bad updates, by number.

    Args:
        updates: Closed updates, in canonical order.
        tensors: Shared tensors.
        watchers: Observers of the values as they pass.
        on_progress: Function that is called with the number of files read and of all files after every block.
        effort: Size of a block, and number of threads.
    """
    shares = np.full((1, len(updates)), 1 / max(1, len(updates)))
    return stream_mean(
        updates, tensors, shares=shares, watchers=watchers, on_progress=on_progress, effort=effort
    ).refused


@dataclass(frozen=True)
class Failure:
    """The error of an update, and the entry of its flat change at which it was found."""

    position: int
    error: FedparaError


@contextmanager
def opened_together(updates: Sequence[Update], failures: dict[int, Failure]) -> Iterator[None]:
    """A context in which updates are open; in the end they are compared with what they were, and with what was signed.

    Args:
        updates: Closed updates.
        failures: The failures so far, by number of the update, to which those of opening and comparing are added. What
            was forged is called so, whatever else is wrong with it.
    """
    with ExitStack() as stack:
        for number, update in enumerate(updates):
            try:
                update.reopen()
                stack.callback(update.close)
            except InvalidUpdateError as error:
                failures[number] = Failure(-1, error)
        missing = set(failures)
        yield
        for number, update in enumerate(updates):
            if number not in missing:
                try:
                    update.file.check_read()
                except InvalidUpdateError as error:
                    failures.setdefault(number, Failure(-1, error))
                except TrustError as error:
                    failures[number] = Failure(-1, error)


class _Block:
    """A block of updates on their way into the means, with a scratch for each thread."""

    def __init__(
        self,
        updates: Sequence[Update],
        tensors: Sequence[TensorSpec],
        shares: NDArray[np.float64],
        means: NDArray[np.float64],
        lanes: Sequence[Scratch],
        watchers: Sequence[Watcher],
    ) -> None:
        self.updates, self.tensors, self.shares = updates, tensors, shares
        self.means, self.lanes, self.watchers = means, lanes, watchers
        self.pieces = list(chunks(means.shape[1]))

    def run(self, pool: ThreadPoolExecutor) -> dict[int, Failure]:
        """Add the block to the means; return the failures by number of the update in the block."""
        failures: dict[int, Failure] = {}
        for watcher in self.watchers:
            watcher.start_block(len(self.updates))
        with opened_together(self.updates, failures):
            missing, threads = dict(failures), len(self.lanes)
            for found in pool.map(lambda thread: self._add(thread, dict(missing)), range(threads)):
                for number, failure in found.items():
                    if number not in failures or failure.position < failures[number].position:
                        failures[number] = failure
        for watcher in self.watchers:
            finish = watcher.finish_block
            list(pool.map(finish, [self.shares[0]] * threads, range(threads), [threads] * threads))
        return failures

    def _add(self, thread: int, failures: dict[int, Failure]) -> dict[int, Failure]:
        pieces = self.pieces[thread :: len(self.lanes)]
        shares = self.shares.astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"), self.lanes[thread].lent():
            for start, stop in pieces:
                memory = scratch("changes", (len(self.updates), 4 * (stop - start))).view(np.float32)
                changes = self._decode(start, memory, failures)
                parts = changes.weighted_sums(shares)
                if np.isfinite(parts).all():
                    self.means[:, start:stop] += parts
                else:
                    values = changes.values()
                    failures.update(find_not_finite(self.updates, self.tensors, start, values))
                    # What is left is finite: it was a sum of huge values that left float32, which float64 holds.
                    self.means[:, start:stop] += np.einsum("mi,ij->mj", self.shares, values, dtype=np.float64)
                for watcher in self.watchers:
                    watcher.collect(start, changes)
        return failures

    def _decode(self, start: int, memory: NDArray[np.float32], failures: dict[int, Failure]) -> Changes:
        decoders = [None if number in failures else update.decoder for number, update in enumerate(self.updates)]
        changes, errors = decode_rows(decoders, start, memory)
        failures.update((number, Failure(start, error)) for number, error in errors.items())
        return changes


def find_not_finite(
    updates: Sequence[Update], tensors: Sequence[TensorSpec], start: int, values: NDArray[np.float32]
) -> dict[int, Failure]:
    """The updates with values that are NaN or infinite, which become 0, by number.

    Args:
        updates: The updates.
        tensors: Shared tensors, sorted by name.
        start: Number of the first entry in the flat change.
        values: Piece of their flat changes, float32 [updates, entries].
    """
    found = {}
    for number, (update, row) in enumerate(zip(updates, values, strict=True)):
        bad = np.flatnonzero(~np.isfinite(row))
        if bad.size:
            found[number] = Failure(start, not_finite(update, tensors, start + int(bad[0])))
            row.fill(0)
    return found


def not_finite(update: Update, tensors: Sequence[TensorSpec], position: int) -> InvalidUpdateError:
    """The error of an update whose flat change is NaN or infinite at `position`."""
    return InvalidUpdateError(
        f"{update.path}: tensor {name_at(tensors, position)!r}: expected a finite change, found NaN or Inf; "
        "the training diverged: lower its learning rate",
        code="not_finite",
    )
