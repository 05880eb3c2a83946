"""Decoding a chunk of one file, or that of several at once.

With a few calls for every small chunk of every file, two threads would mostly wait for each other at the lock of the
interpreter. So where files have the same arithmetic, it is done for `TOGETHER` of them in one go.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.codecs.codec import Decoder, Pending, chunks
from fedpara_edge.errors import InvalidUpdateError

TOGETHER = 10
"""Files of which that many chunks are computed at once; with more, the memory grows and the speed does not."""


def decode(decoder: Decoder, start: int, out: NDArray[np.float32]) -> None:
    """Decode the chunk of the flat change that starts at `start` into `out`, float32 of the chunk's length.

    Raises:
        InvalidUpdateError: what is stored is damaged.
    """
    pending = decoder.load(start, out)
    if pending is not None:
        pending.arithmetic.compute(start, [pending.loaded], out[np.newaxis])


def decode_all(decoder: Decoder, entries: int) -> NDArray[np.float32]:
    """The whole flat change, a new array of that many entries.

    Raises:
        InvalidUpdateError: what is stored is damaged.
    """
    change = np.empty(entries, np.float32)
    for start, stop in chunks(entries):
        decode(decoder, start, change[start:stop])
    return change


def decode_rows(
    decoders: Sequence[Decoder | None], start: int, out: NDArray[np.float32]
) -> dict[int, InvalidUpdateError]:
    """Decode the same chunk of several files with the same tensors, a row for each.

    Args:
        decoders: of the files; None for a row to leave as it is.
        start: entry of the flat change.
        out: float32 [files, entries of the chunk]; rows of damaged files hold anything afterwards.

    Returns:
        What is wrong with the damaged files, by their number.
    """
    failures: dict[int, InvalidUpdateError] = {}
    rows: list[Pending | None] = []
    for number, decoder in enumerate(decoders):
        try:
            rows.append(decoder.load(start, out[number]) if decoder is not None else None)
        except InvalidUpdateError as error:
            failures[number] = error
            rows.append(None)
    first = 0
    for arithmetic, neighbours in groupby(rows, key=lambda row: row.arithmetic if row is not None else None):
        loaded = [row.loaded if row is not None else None for row in neighbours]
        if arithmetic is not None:
            for begin in range(0, len(loaded), TOGETHER):
                some = loaded[begin : begin + TOGETHER]
                arithmetic.compute(start, some, out[first + begin : first + begin + len(some)])
        first += len(loaded)
    return failures
