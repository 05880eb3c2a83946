"""The codecs `int8`, `int4`, `int3` and `int2`: integers from -L to L times the scale of a block.

L = 2^(bits - 1) - 1. Setting: `block`, the number of entries that share a scale, from 16 to 65536 (`blocks`). The
section of a chunk (`payload`) is

    scales      bfloat16 of each block (`scales`)
    plain       in version 2, the lower halves of the integers (`halves`)
    symbols     in version 1 their digits (`digits`), in version 2 their upper halves, entropy-coded (`frames`)

and an entry is its integer times its scale. Version 2 exists for `int8` only, whose version 1 is still read; the
others have only a version 1.

With a seed, integers are rounded at random and the scale is max |x| / L: the decoded change is unbiased. Without, they
are rounded to the nearest, and the scale is smaller than that where clipping the few largest entries lowers the squared
error. That is a contraction, ‖x - decoded‖ < ‖x‖, which error feedback needs.

Source: Alistarh et al., QSGD (arXiv 1610.02132).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.codecs.changes import BlockScales
from fedpara_edge.codecs.codec import Encoded
from fedpara_edge.codecs.digits import Digits
from fedpara_edge.codecs.frames import compress, decompress_all, require_zstandard
from fedpara_edge.codecs.halves import Halves
from fedpara_edge.codecs.payload import PayloadDecoder, open_payload, write_payload
from fedpara_edge.codecs.rounding import generator, round_randomly
from fedpara_edge.codecs.scales import check_range, from_bytes, round_up, to_bytes
from fedpara_edge.codecs.section import Section
from fedpara_edge.codecs.settings import read_settings
from fedpara_edge.factors.layout import TensorSpec
from fedpara_edge.options import check, option
from fedpara_edge.storage.tensorfile import TensorFile

BLOCKS = range(16, (1 << 16) + 1)
BITS = range(2, 9)
_HALVES = Halves()
_STEPS = {1: 1.31, 3: 0.76, 7: 0.45}
"""Scale of least squared error when rounding to the nearest, over the root mean square of a block, by L.

Measured on updates of FedPara models; between the values for Gaussian entries (1.22, 0.65, 0.35) and for Laplacian ones
(1.43, 0.83, 0.49)."""


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
    bits: int = option(minimum=BITS[0], maximum=BITS[-1], help="Bits per integer, before entropy coding.")
    block: int = option(1024, minimum=BLOCKS[0], maximum=BLOCKS[-1], help="Block size in entries.")
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
        check_range(tensors, change)
        largest = largest_of(self.bits)
        packing = _packing(largest, self.version)
        random = None if seed is None else generator(seed)

        def write(
            _: int, values: NDArray[np.float32], lengths: NDArray[np.intp], decoded: NDArray[np.float32]
        ) -> bytes:
            magnitudes = np.abs(values)
            starts = np.cumsum(lengths) - lengths
            wanted = np.maximum.reduceat(magnitudes, starts) / np.float32(largest)
            if random is None and largest in _STEPS:
                squares = np.add.reduceat(np.square(values, dtype=np.float64), starts)
                wanted = np.minimum(wanted, _STEPS[largest] * np.sqrt(squares / lengths))
            scales = round_up(wanted)
            ratios = values / np.repeat(np.where(scales > 0, scales, 1), lengths)
            rounded = np.rint(ratios, out=ratios) if random is None else round_randomly(ratios, random)
            integers = np.clip(rounded, -largest, largest, out=rounded).astype(np.int8)
            decoded[:] = integers
            BlockScales(scales[np.newaxis], lengths).multiply(decoded[np.newaxis])
            plain, symbols = packing.pack(integers)
            return to_bytes(scales) + plain + compress(symbols, entropy=bool(self.entropy))

        return write_payload(tensors, change, write, block=self.block, settings={"block": self.block})


def open_integers(
    file: TensorFile,
    tensors: Sequence[TensorSpec],
    settings: Mapping[str, Any],
    *,
    name: str,
    bits: int,
    version: int = 1,
) -> PayloadDecoder:
    """Decoder of a file of any of these codecs.

    Args:
        file: Open file.
        tensors: Shared tensors, in the order of the flat change.
        settings: Settings from the header, as the module describes them.
        name: Codec name.
        bits: Bits per integer.
        version: Codec version.

    Raises:
        InvalidUpdateError: A setting or the payload does not fit.
        InputError: The package zstandard is missing.
    """
    block = read_settings(file, name, settings, block=BLOCKS)["block"]
    require_zstandard()
    return open_payload(file, tensors, Products(_packing(largest_of(bits), version), block), block=block)


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


def largest_of(bits: int) -> int:
    """Largest integer L of `bits` bits.

    >>> [largest_of(bits) for bits in (2, 3, 4, 8)]
    [1, 3, 7, 127]
    """
    return (1 << (bits - 1)) - 1


@dataclass(frozen=True)
class Products:
    """Section decoder of packed integers and the scales of their blocks; equal ones cut chunks into equal blocks.

    Args:
        packing: Packing of the integers.
        block: Block size in entries.
    """

    packing: Packing
    block: int

    def decode(
        self,
        start: int,  # noqa: ARG002
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
        return BlockScales(scales, lengths)
