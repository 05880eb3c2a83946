"""Integers from -L to L packed into bytes as digits.

With base B = 2L + 1 and k the most digits of which B^k <= 256 (k = 1 for L = 127, 2 for 7 and 3, 5 for 1), n integers
take h = ceil(n / k) bytes: byte i holds the integers number i, i + h, i + 2h, …, each plus L, as its digits, the first
the least. Where there is no such integer, the digit is that of 0. Whole arrays of digits are so taken off by one
division each, far faster than neighbours in one byte.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.codecs.section import DamageError


def digits_per_byte(largest: int) -> int:
    """k, for integers from -`largest` to `largest`.

    >>> [digits_per_byte(largest) for largest in (1, 3, 7, 127)]
    [5, 2, 2, 1]
    """
    base, digits = 2 * largest + 1, 0
    while base ** (digits + 1) <= 256:
        digits += 1
    return digits


def packed_bytes(count: int, largest: int) -> int:
    """Number of bytes that `count` integers take."""
    return -(-count // digits_per_byte(largest))


def pack(integers: NDArray[np.int8], largest: int) -> NDArray[np.uint8]:
    """Pack integers, int8 [n] from -`largest` to `largest`, into uint8 [h].

    >>> pack(np.array([1, 0, -1], np.int8), 3)
    array([18, 24], dtype=uint8)
    """
    base, width = 2 * largest + 1, packed_bytes(len(integers), largest)
    digits = np.full((digits_per_byte(largest), width), largest, np.uint8)
    np.add(integers.view(np.uint8), np.uint8(largest), out=digits.reshape(-1)[: len(integers)])
    packed: NDArray[np.uint8] = digits[-1]
    for row in digits[-2::-1]:
        packed = packed * np.uint8(base) + row
    return packed


def check_packed(packed: NDArray[np.uint8], largest: int) -> None:
    """See to it that no byte holds more than its digits.

    Raises:
        DamageError: one does.
    """
    found = int(packed.max(initial=0))
    if found >= (2 * largest + 1) ** digits_per_byte(largest):
        raise DamageError(f"integers from -{largest} to {largest}, found a byte of {found}")


def unpack(packed: NDArray[np.uint8], largest: int, out: NDArray[np.float32]) -> None:
    """Unpack uint8 [..., h] into float32 [..., n], each row for itself."""
    base, digits, width = 2 * largest + 1, digits_per_byte(largest), packed.shape[-1]
    rest, digit = packed, np.empty_like(packed)
    for number in range(digits):
        # The digit less `largest`, which as a byte of two's complement is the integer.
        if number < digits - 1:
            higher = rest // np.uint8(base)
            np.multiply(higher, np.uint8(base), out=digit)
            np.subtract(rest, digit, out=digit)
            np.subtract(digit, np.uint8(largest), out=digit)
            rest = higher
        else:
            np.subtract(rest, np.uint8(largest), out=digit)
        part = out[..., number * width : (number + 1) * width]
        part[...] = digit.view(np.int8)[..., : part.shape[-1]]
