"""Sums of what the chunks of a change are stored in, so that a value that was flipped on a disk is noticed.

The header field `sums` of a file has 16 hexadecimal digits for each chunk, and as many for running statistics that are
stored apart (`statistics`), one after the other in one text. They are the sum, modulo 2^64, of the little-endian 64-bit
words of

    float32       the entries of the chunk
    others        the section of the chunk (`payload`), or the array `statistics`

with zeros behind the last byte up to a whole word. A sum finds any damage within one word, and other damage but for one
in 2^64; words that change places are not found. It costs a small part of what a CRC-32 does, as chunks are summed
while they are in the processor's cache. Files of releases up to 0.2 have none, and are read without.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.errors import InvalidUpdateError, brief
from fedpara_edge.storage.tensorfile import TensorFile

FIELD = "sums"
Sums = NDArray[np.uint64]


def sum_of(data: NDArray[Any]) -> int:
    """The sum of the words of an array in C order.

    >>> sum_of(np.array([1, 2, 3], np.uint32)) == 1 + 3 + (2 << 32)
    True
    """
    flat = np.ascontiguousarray(data).reshape(-1)
    if data.nbytes % 8 == 0:
        return int(np.add.reduce(flat.view("<u8")))
    stored = flat.view(np.uint8)
    whole = len(stored) // 8 * 8
    rest = int.from_bytes(stored[whole:].tobytes(), "little")
    return (int(np.add.reduce(stored[:whole].view("<u8"))) + rest) % (1 << 64)


def sums_of_rows(rows: NDArray[np.uint8], sizes: Iterable[int]) -> Sums:
    """The sum of each of some rows of bytes, uint64 [rows].

    Args:
        rows: Memory that begins with the bytes of each row, uint8 [rows, multiple of 8]; what is behind them is lost.
        sizes: Bytes of each row.
    """
    for row, size in zip(rows, sizes, strict=True):
        row[size:] = 0
    found: Sums = np.add.reduce(rows.view("<u8"), axis=1)
    return found


def to_text(sums: Iterable[int]) -> str:
    """The header field of some sums."""
    return "".join(f"{each:016x}" for each in sums)


def read_sums(file: TensorFile, count: int) -> Sums | None:
    """The sums that an open file states, uint64 [count]; None where it states none.

    Raises:
        InvalidUpdateError: It states something else.
    """
    text = file.header.get(FIELD)
    if text is None:
        return None
    try:
        if not isinstance(text, str) or len(text) != 16 * count or text.strip() != text:
            raise ValueError
        return np.frombuffer(bytes.fromhex(text), ">u8").astype(np.uint64)
    except ValueError as error:
        raise InvalidUpdateError(
            f"{file.path}: {FIELD}: expected {count} sums of 16 hexadecimal digits, found {brief(text)}; {file.remedy}",
            code="header",
        ) from error


def damaged(file: TensorFile, what: str) -> InvalidUpdateError:
    """The error about a part of a file whose sum is another than stated."""
    return InvalidUpdateError(
        f"{file.path}: {what}: expected content with the sum that its header states, found other content: it was "
        f"changed or damaged; {file.remedy}",
        code="digest",
    )
