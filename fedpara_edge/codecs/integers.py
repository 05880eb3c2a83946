"""The codecs `int8`, `int4`, `int3`, `int2` and `rotated`: integers from -L to L times the scale of a block.

L = 2^(bits - 1) - 1. Settings: `block`, the number of entries that share a scale, from 16 to 65536 (`blocks`); for
`rotated` also `bits`, from 2 to 8, and `seed`, a uint32. The section of a chunk (`payload`) is

    scales      bfloat16 of each block (`scales`)
    plain       in version 2, the lower halves of the integers (`halves`)
    symbols     in version 1 their digits (`digits`), in version 2 their upper halves, entropy-coded (`frames`)

and an entry is its integer times its scale; for `rotated` the integers are first rotated back (`hadamard`), in the
same blocks. Version 2 exists for `int8` only, whose version 1 is still read; the others have only a version 1.

With a seed, integers are rounded at random and the scale is max |x| / L: the decoded change is unbiased. Without, they
are rounded to the nearest, and the scale is smaller than that where clipping the few largest entries lowers the squared
error. That is a contraction, ‖x - decoded‖ < ‖x‖, which error feedback needs.

Source: Alistarh et al., QSGD (arXiv 1610.02132); Suresh et al. (arXiv 1611.00429) for the rotation.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.codecs.changes import BlockScales
from fedpara_edge.codecs.codec import Encoded
from fedpara_edge.codecs.digits import Digits
from fedpara_edge.codecs.frames import compress, decompress_all, require_zstandard
from fedpara_edge.codecs.hadamard import signs, transform
from fedpara_edge.codecs.halves import Halves
from fedpara_edge.codecs.payload import PayloadDecoder, open_payload, write_payload
from fedpara_edge.codecs.rounding import generator, round_randomly
from fedpara_edge.codecs.scales import LARGEST, check_range, from_bytes, round_up, to_bytes
from fedpara_edge.codecs.section import Section
from fedpara_edge.codecs.settings import read_settings
from fedpara_edge.factors.layout import TensorSpec
from fedpara_edge.options import check, option
from fedpara_edge.storage.tensorfile import TensorFile

_BLOCKS = range(16, (1 << 16) + 1)
_BITS = range(2, 9)
_SEEDS = range(1 << 32)
_HALVES = Halves()
_STEPS = {1: 1.31, 3: 0.76, 7: 0.45}
"""Scale of least squared error when rounding to the nearest, over the root mean square of a block, by L.

Measured on updates of FedPara models; between the values for Gaussian entries (1.22, 0.65, 0.35) and for Laplacian ones
(1.43, 0.83, 0.49)."""
_ROTATED_STEPS = {1: 1.22, 3: 0.65, 7: 0.35, 15: 0.19, 31: 0.105, 63: 0.057}
"""The same for Gaussian entries."""


@dataclass(frozen=True, kw_only=True)
class Integers:
    """Encoder of integers with one scale per block (uniform quantization).

    Args:
        name: Codec name stored in file headers.
        bits: Bits per integer before entropy coding.
        block: Block size in entries.
        entropy: 1 to entropy-code the integers; 0 to skip that, for a server with more bandwidth than time.

    Raises:
        InputError: An option is out of range, or the package zstandard is missing.
    """

    name: str
    bits: int = option(minimum=_BITS[0], maximum=_BITS[-1], help="Bits per integer, before entropy coding.")
    block: int = option(1024, minimum=_BLOCKS[0], maximum=_BLOCKS[-1], help="Block size in entries.")
    entropy: int = option(1, minimum=0, maximum=1, help="1 to entropy-code the integers, 0 to skip that.")
    unbiased: ClassVar[bool] = True

    @property
    def version(self) -> int:
        """Codec version stored in file headers."""
        return 2 if self.name == "int8" else 1

    def __post_init__(self) -> None:
        check(self)
        require_zstandard()

    def encode(self, tensors: Sequence[TensorSpec], change: NDArray[np.float32], *, seed: int | None) -> Encoded:
        """Encode without bias given a seed, and rounded to the nearest otherwise."""
        rotated = self.name == "rotated"
        # Rotating a block makes its largest entry at most √block times as large.
        check_range(tensors, change, LARGEST / math.sqrt(self.block) if rotated else LARGEST)
        largest = _largest(self.bits)
        packing = _packing(largest, self.version)
        steps = _ROTATED_STEPS if rotated else _STEPS
        random = None if seed is None else generator(seed)
        settings = {"block": self.block}
        if rotated:
            # Different signs for every change, so that the errors of clients and rounds average out.
            rotation_seed = (zlib.crc32(change.data) if seed is None else seed) % len(_SEEDS)
            settings |= {"bits": self.bits, "seed": rotation_seed}

        def write(
            start: int, values: NDArray[np.float32], lengths: NDArray[np.intp], decoded: NDArray[np.float32]
        ) -> bytes:
            if rotated:
                values = values * signs(rotation_seed, start, len(values))
                transform(values, lengths)
            magnitudes = np.abs(values)
            starts = np.cumsum(lengths) - lengths
            wanted = np.maximum.reduceat(magnitudes, starts) / np.float32(largest)
            if random is None and largest in steps:
                squares = np.add.reduceat(np.square(values, dtype=np.float64), starts)
                wanted = np.minimum(wanted, steps[largest] * np.sqrt(squares / lengths))
            scales = round_up(wanted)
            ratios = values / np.repeat(np.where(scales > 0, scales, 1), lengths)
            rounded = np.rint(ratios, out=ratios) if random is None else round_randomly(ratios, random)
            integers = np.clip(rounded, -largest, largest, out=rounded).astype(np.int8)
            decoded[:] = integers
            if rotated:
                _rotate_back(decoded[np.newaxis], lengths, rotation_seed, start)
            BlockScales(scales[np.newaxis], lengths).multiply(decoded[np.newaxis])
            plain, symbols = packing.pack(integers)
            return to_bytes(scales) + plain + compress(symbols, entropy=bool(self.entropy))

        return write_payload(tensors, change, write, block=self.block, settings=settings)


@dataclass(frozen=True, kw_only=True)
class Rotated(Integers):
    """Encoder as `Integers`, after a randomized rotation of the blocks."""

    name: str = "rotated"
    bits: int = option(4, minimum=_BITS[0], maximum=_BITS[-1], help="Bits per integer, before entropy coding.")


def open_integers(
    file: TensorFile,
    tensors: Sequence[TensorSpec],
    settings: Mapping[str, Any],
    *,
    name: str,
    bits: int = 0,
    version: int = 1,
) -> PayloadDecoder:
    """Decoder of a file of any of these codecs.

    Args:
        file: Open file.
        tensors: Shared tensors, in the order of the flat change.
        settings: Settings from the header, as the module describes them.
        name: Codec name.
        bits: Bits per integer; 0 if the settings state them.
        version: Codec version.

    Raises:
        InvalidUpdateError: A setting or the payload does not fit.
        InputError: The package zstandard is missing.
    """
    ranges = {"block": _BLOCKS} if bits else {"block": _BLOCKS, "bits": _BITS, "seed": _SEEDS}
    found = read_settings(file, name, settings, **ranges)
    require_zstandard()
    packing = _packing(_largest(bits or found["bits"]), version)
    products = _Products(packing, found["block"], found.get("seed"))
    return open_payload(file, tensors, products, block=found["block"])


class Packing(Protocol):
    """Way of turning integers into bytes: one part to be stored as it is, the other to be entropy-coded."""

    def sizes(self, count: int) -> tuple[int, int]:
        """Bytes of each part for `count` integers: as they are, and to be entropy-coded."""
        ...

    def pack(self, integers: NDArray[np.int8]) -> tuple[bytes, bytes]:
        """Pack integers, int8 [n], into the two parts."""
        ...

    def unpack(self, plain: NDArray[np.uint8], symbols: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        """Unpack the parts, uint8 [..., size], into integers, float32 [..., n], row by row.

        Raises:
            DamageError: An integer is out of range.
        """
        ...


def _packing(largest: int, version: int) -> Packing:
    return _HALVES if version == 2 else Digits(largest)


def _largest(bits: int) -> int:
    return (1 << (bits - 1)) - 1


@dataclass(frozen=True)
class _Products:
    """Decoder of packed integers and the scales of their blocks; equal ones cut chunks into equal blocks."""

    packing: Packing
    block: int
    rotation_seed: int | None

    def decode(
        self,
        start: int,
        stored: NDArray[np.uint8],
        sizes: Sequence[int],
        lengths: NDArray[np.intp],
        out: NDArray[np.float32],
    ) -> BlockScales:
        """Fill `out` with integers; return the scales of their blocks."""
        scale_bytes = 2 * len(lengths)
        plain_bytes, symbol_bytes = self.packing.sizes(out.shape[1])
        sections = [Section(row[:size]) for row, size in zip(stored, sizes, strict=True)]
        for section in sections:
            section.take(scale_bytes, "scales")
            section.take(plain_bytes, "integers")
        symbols = decompress_all(sections, symbol_bytes)
        for section in sections:
            section.finish()
        scales = from_bytes(stored[:, :scale_bytes])
        self.packing.unpack(stored[:, scale_bytes : scale_bytes + plain_bytes], symbols, out)
        if self.rotation_seed is not None:
            _rotate_back(out, lengths, self.rotation_seed, start)
        return BlockScales(scales, lengths)


def _rotate_back(integers: NDArray[np.float32], lengths: NDArray[np.intp], rotation_seed: int, start: int) -> None:
    """Undo the rotation of integers [files, entries], in place."""
    for row in integers:
        transform(row, lengths)
    integers *= signs(rotation_seed, start, integers.shape[1])
