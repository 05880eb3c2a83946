"""Decoding a chunk of one file, or that of several at once.

With a few calls for every small chunk of every file, two threads would mostly wait for each other at the lock of the
interpreter. So where files have the same arithmetic, it is done for all of them in one go.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.codecs.changes import Changes
from fedpara_edge.codecs.codec import Decoder, Pending, chunks
from fedpara_edge.codecs.section import DamageError
from fedpara_edge.errors import InvalidUpdateError


def decode(decoder: Decoder, start: int, out: NDArray[np.float32]) -> None:
    """Decode the chunk of the flat change that starts at `start` into `out`, float32 of the chunk's length.

    Raises:
        InvalidUpdateError: what is stored is damaged.
    """
    pending = decoder.load(start, out)
    if pending is not None:
        _compute(pending, start, out)


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
) -> tuple[Changes, dict[int, InvalidUpdateError]]:
    """Decode the same chunk of several files with the same tensors.

    Args:
        decoders: of the files; None for one whose change is taken to be zero.
        start: entry of the flat change.
        out: float32 [files, entries of the chunk], memory for the changes.

    Returns:
        The changes, those of damaged files zero, and what is wrong with these, by their number.
    """
    failures: dict[int, InvalidUpdateError] = {}
    rows: list[Pending | None] = []
    for number, decoder in enumerate(decoders):
        pending = None
        try:
            pending = decoder.load(start, out[number]) if decoder is not None else None
        except InvalidUpdateError as error:
            failures[number] = error
        rows.append(pending)
    scales, first = [], 0
    for arithmetic, neighbours in groupby(rows, key=lambda row: row.arithmetic if row is not None else None):
        group = list(neighbours)
        some = out[first : first + len(group)]
        if arithmetic is not None:
            try:
                scales.append((first, arithmetic.compute(start, [row.loaded for row in group if row], some)))
            except DamageError:
                failures.update(_compute_each(group, first, start, some))
        first += len(group)
    for number, decoder in enumerate(decoders):
        if decoder is None or number in failures:
            out[number] = 0
    return Changes(out, scales), failures


def _compute(pending: Pending, start: int, out: NDArray[np.float32]) -> None:
    try:
        scales = pending.arithmetic.compute(start, [pending.loaded], out[np.newaxis])
    except DamageError as damage:
        raise pending.refusal(damage) from damage
    scales.multiply(out[np.newaxis])


def _compute_each(
    group: Sequence[Pending | None], first: int, start: int, out: NDArray[np.float32]
) -> Iterator[tuple[int, InvalidUpdateError]]:
    """The damaged ones of some files, by their number; the changes of the others are computed."""
    for number, (pending, row) in enumerate(zip(group, out, strict=True), first):
        try:
            if pending is not None:
                _compute(pending, start, row)
        except InvalidUpdateError as error:
            yield number, error
