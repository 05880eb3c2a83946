"""Integers from -L to L packed into bytes as digits.

With base B = 2L + 1 and k the largest number of digits with B^k <= 256 (k = 1 for L = 127, 2 for 7 and 3, 5 for 1), n
integers take h = ceil(n / k) bytes: byte i holds integers i, i + h, i + 2h, …, each plus L, as its digits, the least
significant first. Where there is no such integer, the digit is that of 0. A whole array of digits is thus split off by
one division, far faster than if neighbours shared a byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.codecs.scratch import scratch
from fedpara_edge.codecs.section import DamageError


@dataclass(frozen=True)
class Digits:
    """Packing (`integers.Packing`) of integers from -L to L.

    Args:
        largest: Largest integer L.

    >>> plain, symbols = Digits(3).pack(np.array([1, 0, -1], np.int8))
    >>> plain, list(symbols)
    (b'', [18, 24])
    """

    largest: int

    @property
    def digits_per_byte(self) -> int:
        """Number of digits k in a byte.

        >>> [Digits(largest).digits_per_byte for largest in (1, 3, 7, 127)]
        [5, 2, 2, 1]
        """
        base, digits = 2 * self.largest + 1, 0
        while base ** (digits + 1) <= 256:
            digits += 1
        return digits

    def sizes(self, count: int) -> tuple[int, int]:
        """Bytes of each part: 0 stored as they are, and h to be entropy-coded."""
        return 0, -(-count // self.digits_per_byte)

    def pack(self, integers: NDArray[np.int8]) -> tuple[bytes, bytes]:
        """Pack integers: nothing to store as it is, and the digits."""
        base, (_, width) = 2 * self.largest + 1, self.sizes(len(integers))
        digits = np.full((self.digits_per_byte, width), self.largest, np.uint8)
        np.add(integers.view(np.uint8), np.uint8(self.largest), out=digits.reshape(-1)[: len(integers)])
        packed: NDArray[np.uint8] = digits[-1]
        for row in digits[-2::-1]:
            packed = packed * np.uint8(base) + row
        return b"", packed.tobytes()

    def unpack(self, _: NDArray[np.uint8], symbols: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        """Split off digit by digit."""
        base, digits, width = 2 * self.largest + 1, self.digits_per_byte, symbols.shape[-1]
        found = int(symbols.max(initial=0))
        if found >= base**digits:
            raise DamageError(f"integers from -{self.largest} to {self.largest}, found a byte of {found}")
        rest, digit = symbols, scratch("digit", symbols.shape)
        for number in range(digits):
            # The digit minus `largest`, which as a byte in two's complement is the integer.
            if number < digits - 1:
                higher = np.floor_divide(rest, np.uint8(base), out=scratch(f"rest {number % 2}", symbols.shape))
                np.multiply(higher, np.uint8(base), out=digit)
                np.subtract(rest, digit, out=digit)
                np.subtract(digit, np.uint8(self.largest), out=digit)
                rest = higher
            else:
                np.subtract(rest, np.uint8(self.largest), out=digit)
            part = out[..., number * width : (number + 1) * width]
            part[...] = digit.view(np.int8)[..., : part.shape[-1]]
