"""Decoding of a chunk, from one file or from several at once.

With a few calls for every small chunk of every file, two threads would mostly wait for each other at the interpreter
lock. So where files need the same arithmetic, it is done for all of them in one go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.codecs.changes import BlockScales, Changes
from fedpara_edge.codecs.codec import Decoder, chunks
from fedpara_edge.codecs.payload import PayloadDecoder, decode_together
from fedpara_edge.codecs.section import DamageError
from fedpara_edge.codecs.statistics import StatisticsDecoder
from fedpara_edge.errors import InvalidUpdateError


def decode_all(decoder: Decoder, entries: int) -> NDArray[np.float32]:
    """Whole flat change of a file: a new array, float32 [entries].

    Raises:
        InvalidUpdateError: The stored data is damaged.
    """
    change = np.empty(entries, np.float32)
    for start, stop in chunks(entries):
        decoder.decode(start, change[start:stop])
    return change


def decode_range(decoder: Decoder, first: int, count: int, entries: int) -> NDArray[np.float32]:
    """Part of a flat change: a new array, float32 [count].

    Args:
        decoder: Decoder of the change.
        first: Number of the first entry.
        count: Number of entries.
        entries: Number of entries of the whole change.

    Raises:
        InvalidUpdateError: The stored data is damaged.
    """
    part = np.empty(count, np.float32)
    for start, stop in chunks(entries):
        low, high = max(start, first), min(stop, first + count)
        if low < high:
            whole = np.empty(stop - start, np.float32)
            decoder.decode(start, whole)
            part[low - first : high - first] = whole[low - start : high - start]
    return part


@dataclass(frozen=True)
class ScaledDecoder:
    """Decoder of a change times a factor for each of its parts.

    Args:
        decoder: Decoder of the change itself.
        parts: Parts of the flat change, each with its first entry, the entry after its last one, and its factor.
    """

    decoder: Decoder
    parts: Sequence[tuple[int, int, float]]

    def decode(self, start: int, out: NDArray[np.float32]) -> None:
        """Decode a chunk and multiply it (`codec.Decoder`)."""
        self.decoder.decode(start, out)
        for first, stop, factor in self.parts:
            out[max(first - start, 0) : max(stop - start, 0)] *= np.float32(factor)


def decode_rows(
    decoders: Sequence[Decoder | None], start: int, out: NDArray[np.float32]
) -> tuple[Changes, dict[int, InvalidUpdateError]]:
    """Decode the same chunk of several files with the same tensors.

    Args:
        decoders: Decoders of the files; None for a file whose change counts as zero.
        start: Number of the chunk's first entry in the flat change.
        out: Memory for the changes, float32 [files, entries of the chunk].

    Returns:
        Changes, those of damaged files zero, and the error of each damaged file by its number.
    """
    stop = start + out.shape[1]
    decoders = [
        decoder.trained if isinstance(decoder, StatisticsDecoder) and stop <= decoder.entries else decoder
        for decoder in decoders
    ]
    failures: dict[int, InvalidUpdateError] = {}
    scales: list[tuple[int, BlockScales]] = []
    for _, neighbours in groupby(enumerate(decoders), key=lambda item: _how(item[1])):
        group = list(neighbours)
        first, last = group[0][0], group[-1][0] + 1
        together = [decoder for _, decoder in group if isinstance(decoder, PayloadDecoder)]
        try:
            if together:
                found = decode_together(together, start, out[first:last])
                scales += [] if found is None else [(first, found)]
                continue
        except (DamageError, InvalidUpdateError):
            pass  # decode them one by one below, to find the damaged file
        for number, decoder in group:
            try:
                if decoder is not None:
                    decoder.decode(start, out[number])
            except InvalidUpdateError as error:
                failures[number] = error
    for number, decoder in enumerate(decoders):
        if decoder is None or number in failures:
            out[number] = 0
    return Changes(out, scales), failures


def _how(decoder: Decoder | None) -> object:
    """Key that is equal for decoders that can decode together."""
    return decoder.sections if isinstance(decoder, PayloadDecoder) else None
