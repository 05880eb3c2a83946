"""Random bits that are the same everywhere: SplitMix64.

Word i from a seed, with all numbers modulo 2^64: z = seed + (i + 1) 0x9E3779B97F4A7C15;
z = (z ^ (z >> 30)) 0xBF58476D1CE4E5B9; z = (z ^ (z >> 27)) 0x94D049BB133111EB; z ^ (z >> 31). Byte 0 of a word is its
lowest, bit 0 of a byte as well.

Source: Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators (OOPSLA 2014).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def random_bytes(seed: int, first: int, last: int) -> NDArray[np.uint8]:
    """Bytes of the words from `first` to the one before `last`, uint8 [8 (last - first)].

    >>> random_bytes(0, 0, 1).tobytes().hex()
    'afcd1d7b39a820e2'
    """
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(first + 1, last + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return z.astype("<u8").view(np.uint8)
