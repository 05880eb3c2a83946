"""The codec `rotated`: integers from -L to L times the scale of a block, after randomized rotations of the block.

L = 2^(bits - 1) - 1. Settings: `block`, the number of entries that share a scale, from 16 to 65536 (`blocks`); `bits`,
from 2 to 8; `seed`, a uint32; in version 2 also `rotations`, 1 or 2. Sections are those of `integers` in version 1. The
integers are rotated back (`hadamard`) in the same blocks, with pieces of up to 65536 entries for one rotation and up to
1024 for two, and then multiplied by the scales. Version 1, which is still read, has one rotation.

Without a seed, the codec rotates once and rounds to the nearest, with the scale of `integers` for Gaussian entries: a
contraction, which error feedback needs.

With a seed, it rotates twice, rounds y to the nearest integers q, and takes the scale ‖y‖² / ⟨y, q⟩ of the block. That
makes the decoded change exact along the change itself, and over random rotations right in expectation: unbiased without
random rounding, and with less than half of its error. Of a Gaussian change 0.49, 0.22 and 0.11 of the norm are left at
2, 3 and 4 bits, where random rounding leaves 1.33, 0.47 and 0.20. A single Hadamard rotation is not random enough for
blocks in which a few entries hold nearly all of the norm, nor are two in pieces of fewer than 256 entries; a block with
such a piece, at a tensor's end, is rounded at random with the scale max |y| / L.

Source: Vargaftik et al., EDEN (ICML 2022, arXiv 2108.08842) for the scale; of Lloyd's levels, which they use, a byte
buys less once the integers are entropy-coded. Suresh et al. (arXiv 1611.00429) for the rotation.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.codecs.changes import BlockScales
from fedpara_edge.codecs.codec import Encoded
from fedpara_edge.codecs.digits import Digits
from fedpara_edge.codecs.frames import compress, require_zstandard
from fedpara_edge.codecs.hadamard import LONGEST, Rotation
from fedpara_edge.codecs.integers import BITS, BLOCKS, Products, largest_of
from fedpara_edge.codecs.payload import PayloadDecoder, open_payload, write_payload
from fedpara_edge.codecs.rounding import generator, round_randomly
from fedpara_edge.codecs.scales import LARGEST, SMALLEST, check_range, round_at_random, round_up, to_bytes
from fedpara_edge.codecs.settings import read_settings
from fedpara_edge.factors.layout import TensorSpec
from fedpara_edge.options import check, option
from fedpara_edge.storage.tensorfile import TensorFile

_SEEDS = range(1 << 32)
_STEPS = {1: 1.22, 3: 0.65, 7: 0.35, 15: 0.19, 31: 0.105, 63: 0.057, 127: 0.031}
"""Step of least squared error for Gaussian entries, over their root mean square, by L."""
_LONGEST = {1: LONGEST, 2: 1 << 10}
"""Longest piece by number of rotations, so that decoding is exact for all L."""
_SHORTEST = 1 << 8
"""Shortest piece in which two rotations have no preferred direction."""


@dataclass(frozen=True, kw_only=True)
class Rotated:
    """Encoder of integers with one scale per block, after randomized rotations of the blocks.

    Args:
        bits: Bits per integer before entropy coding.
        block: Block size in entries.
        entropy: 1 to entropy-code the integers; 0 to skip that, for a server with more bandwidth than time.

    Raises:
        InputError: An option is out of range, or the package zstandard is missing.
    """

    bits: int = option(4, minimum=BITS[0], maximum=BITS[-1], help="Bits per integer, before entropy coding.")
    block: int = option(1024, minimum=BLOCKS[0], maximum=BLOCKS[-1], help="Block size in entries.")
    entropy: int = option(1, minimum=0, maximum=1, help="1 to entropy-code the integers, 0 to skip that.")
    name: ClassVar[str] = "rotated"
    version: ClassVar[int] = 2
    unbiased: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check(self)
        require_zstandard()

    def encode(self, tensors: Sequence[TensorSpec], change: NDArray[np.float32], *, seed: int | None) -> Encoded:
        """Encode without bias given a seed, and with the least error otherwise."""
        # Rotating a block makes its largest entry at most √block times as large.
        check_range(tensors, change, LARGEST / math.sqrt(self.block))
        largest = largest_of(self.bits)
        packing = Digits(largest)
        random = None if seed is None else generator(seed)
        # Different signs for every change, so that the errors of clients and rounds average out.
        rotations, sign_seed = (1, zlib.crc32(change.data)) if seed is None else (2, seed % len(_SEEDS))
        rotation = Rotation(sign_seed, rotations, _LONGEST[rotations])

        def write(
            start: int, values: NDArray[np.float32], lengths: NDArray[np.intp], decoded: NDArray[np.float32]
        ) -> bytes:
            rotated = rotation.rotate(values, lengths, start)
            integers, scales = _quantize(rotated, lengths, largest, random)
            decoded[:] = integers
            rotation.rotate_back(decoded[np.newaxis], lengths, start)
            BlockScales(scales[np.newaxis], lengths).multiply(decoded[np.newaxis])
            _, symbols = packing.pack(integers)
            return to_bytes(scales) + compress(symbols, entropy=bool(self.entropy))

        settings = {"block": self.block, "bits": self.bits, "seed": sign_seed, "rotations": rotations}
        return write_payload(tensors, change, write, block=self.block, settings=settings)


def open_rotated(
    file: TensorFile, tensors: Sequence[TensorSpec], settings: Mapping[str, Any], *, version: int
) -> PayloadDecoder:
    """Decoder of a file of this codec.

    Args:
        file: Open file.
        tensors: Shared tensors, in the order of the flat change.
        settings: Settings from the header, as the module describes them.
        version: Codec version.

    Raises:
        InvalidUpdateError: A setting or the payload does not fit.
        InputError: The package zstandard is missing.
    """
    ranges: dict[str, Sequence[int]] = {"block": BLOCKS, "bits": BITS, "seed": _SEEDS}
    if version > 1:
        ranges["rotations"] = range(1, 3)
    found = {"rotations": 1} | read_settings(file, Rotated.name, settings, **ranges)
    require_zstandard()
    rotation = Rotation(found["seed"], found["rotations"], _LONGEST[found["rotations"]])
    products = Products(Digits(largest_of(found["bits"])), found["block"])
    return open_payload(file, tensors, _Rotated(products, rotation), block=found["block"])


@dataclass(frozen=True)
class _Rotated:
    """Section decoder of rotated integers."""

    products: Products
    rotation: Rotation

    def decode(
        self,
        start: int,
        stored: NDArray[np.uint8],
        sizes: Sequence[int],
        lengths: NDArray[np.intp],
        out: NDArray[np.float32],
    ) -> BlockScales:
        """Fill `out` with integers rotated back; return the scales of their blocks."""
        scales = self.products.decode(start, stored, sizes, lengths, out)
        self.rotation.rotate_back(out, lengths, start)
        return scales


def _quantize(
    values: NDArray[np.float32], lengths: NDArray[np.intp], largest: int, random: np.random.Generator | None
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Integers, int8 [n], and the storable scales of their blocks, float32 [blocks]; at random without bias."""
    starts = np.cumsum(lengths) - lengths
    squares = np.add.reduceat(np.square(values, dtype=np.float64), starts)
    steps = _STEPS[largest] * np.sqrt(squares / lengths)
    highest = np.maximum.reduceat(np.abs(values), starts) / np.float32(largest)
    if random is None:
        scales = round_up(np.minimum(highest, steps))
        return _integers(np.rint(_ratios(values, scales, lengths)), largest), scales
    nearest = _integers(np.rint(_ratios(values, steps, lengths)), largest)
    along = np.add.reduceat(np.multiply(values, nearest, dtype=np.float64), starts)
    corrected = squares / np.where(along > 0, along, np.inf)
    sound = (lengths % _SHORTEST == 0) & (corrected >= SMALLEST) & (corrected <= LARGEST)
    scales = round_up(highest)
    at_random = _integers(round_randomly(_ratios(values, scales, lengths), random), largest)
    scales[sound] = round_at_random(corrected[sound], random)
    return np.where(np.repeat(sound, lengths), nearest, at_random), scales


def _ratios(
    values: NDArray[np.float32], scales: NDArray[np.floating], lengths: NDArray[np.intp]
) -> NDArray[np.float32]:
    divisors = scales.astype(np.float32)
    divisors[divisors <= 0] = 1
    return np.divide(values, np.repeat(divisors, lengths), dtype=np.float32)


def _integers(rounded: NDArray[np.float32], largest: int) -> NDArray[np.int8]:
    return np.clip(rounded, -largest, largest).astype(np.int8)
