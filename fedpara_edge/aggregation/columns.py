"""The same entries of all updates at once, piece by piece, for rules that compare the updates with each other.

A piece has at most `PIECE_ENTRIES` values, so that memory does not depend on the number of updates: where a chunk of
all of them would be more, it is decoded again for each part of it. Files stay open as long as there are few; otherwise
each block of them is opened for each piece.

The chunks are dealt to two lanes, each with sums of its own, whatever the number of threads: so threads change no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.aggregation.effort import Effort
from fedpara_edge.aggregation.norms import NormMeter
from fedpara_edge.aggregation.stream import Failure, find_not_finite, opened_together
from fedpara_edge.codecs.changes import Changes
from fedpara_edge.codecs.codec import chunks, in_order
from fedpara_edge.codecs.decoding import decode_rows
from fedpara_edge.codecs.scratch import Scratch
from fedpara_edge.errors import FedparaError
from fedpara_edge.factors.layout import TensorSpec
from fedpara_edge.formats.update import Update

LANES = 2
OPEN_FILES = 128
PIECE_ENTRIES = 1 << 24

Work = Callable[[int, int, NDArray[np.float32]], None]
"""What is done with a piece: its lane, the number of its first entry, and the rows, float32 [updates, entries], which
it may overwrite."""


def read_columns(
    updates: Sequence[Update], tensors: Sequence[TensorSpec], work: Work, *, meter: NormMeter, effort: Effort
) -> dict[int, FedparaError]:
    """Read all updates once, piece by piece; return the errors of those that turned out bad, by their number.

    Args:
        updates: Closed updates, in canonical order.
        tensors: Shared tensors.
        work: Function that is called with each piece; values of bad updates are 0 from where that was found.
        meter: Meter of their norms.
        effort: Division of the work.
    """
    reader = _Reader(updates, in_order(tensors), work, meter, effort)
    meter.start_block(len(updates))
    failures: dict[int, Failure] = {}
    few = len(updates) <= OPEN_FILES
    with ExitStack() as opened, ThreadPoolExecutor(effort.threads) as pool:
        if few:
            opened.enter_context(opened_together(updates, failures))
        missing = dict(failures)
        lanes = (pool.map if few else map)(lambda lane: reader.run(lane, dict(missing), few), range(LANES))
        for found in lanes:
            for number, failure in found.items():
                if number not in failures or failure.position < failures[number].position:
                    failures[number] = failure
    return {number: failure.error for number, failure in failures.items()}


class _Reader:
    """Updates that are read by columns, with what is done with them."""

    def __init__(
        self, updates: Sequence[Update], tensors: Sequence[TensorSpec], work: Work, meter: NormMeter, effort: Effort
    ) -> None:
        self.updates, self.tensors, self.work, self.meter, self.effort = updates, tensors, work, meter, effort
        self.chunks = list(chunks(sum(tensor.size for tensor in tensors)))
        self.width = max(1, PIECE_ENTRIES // len(updates))

    def run(self, lane: int, failures: dict[int, Failure], are_open: bool) -> dict[int, Failure]:
        """Read the pieces of a lane; return the failures by number of the update."""
        chunk_entries = max((stop - start for start, stop in self.chunks), default=0)
        memory = np.empty(len(self.updates) * min(self.width, chunk_entries), np.float32)
        with Scratch().lent():
            self._read(lane, memory, failures, are_open)
        return failures

    def _read(self, lane: int, memory: NDArray[np.float32], failures: dict[int, Failure], are_open: bool) -> None:
        for start, stop in self.chunks[lane::LANES]:
            for first in range(start, stop, self.width):
                last = min(first + self.width, stop)
                rows = memory[: len(self.updates) * (last - first)].reshape(len(self.updates), last - first)
                for block in range(0, len(self.updates), self.effort.block_files):
                    numbers = range(block, min(block + self.effort.block_files, len(self.updates)))
                    self._decode((start, stop), (first, last), rows, numbers, failures, are_open)
                with np.errstate(over="ignore", invalid="ignore"):
                    squares = self.meter.add(first, Changes(rows))
                    if not np.isfinite(squares).all():
                        failures.update(find_not_finite(self.updates, self.tensors, first, rows))
                    self.work(lane, first, rows)

    def _decode(
        self,
        chunk: tuple[int, int],
        part: tuple[int, int],
        rows: NDArray[np.float32],
        numbers: range,
        failures: dict[int, Failure],
        are_open: bool,
    ) -> None:
        updates = [self.updates[number] for number in numbers]
        own = rows[numbers.start : numbers.stop]
        whole = own if part == chunk else np.empty((len(updates), chunk[1] - chunk[0]), np.float32)
        with ExitStack() as opened:
            found: dict[int, Failure] = {}
            if not are_open:
                opened.enter_context(opened_together(updates, found))
            good = [k not in found and number not in failures for k, number in enumerate(numbers)]
            decoders = [update.decoder if taken else None for update, taken in zip(updates, good, strict=True)]
            changes, errors = decode_rows(decoders, chunk[0], whole)
            found.update((k, Failure(chunk[0], error)) for k, error in errors.items())
        values = changes.values()
        if part != chunk:
            own[:] = values[:, part[0] - chunk[0] : part[1] - chunk[0]]
        failures.update((numbers[k], failure) for k, failure in found.items() if numbers[k] not in failures)
