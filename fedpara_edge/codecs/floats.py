"""The codecs `float16` and `bfloat16`, version 1: every entry rounded to 16 bits.

The 16 bits of an entry are rotated left by one, so that the exponent is in the high byte and the sign is the lowest
bit. The section of a chunk (`payload`) of n entries is

    low     n low bytes, noise
    high    n high bytes (`frames`), which take only a few values

Rounding is to the nearest, ties to even, never to infinity. The relative error of an entry is at most 2^-11 (float16,
from 2^-14 to 65504; the absolute error is at most 2^-25 below that) or 2^-8 (bfloat16).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.codecs.codec import Encoded
from fedpara_edge.codecs.frames import compress, decompress, require_zstandard
from fedpara_edge.codecs.payload import EachAlone, PayloadDecoder, open_payload, write_payload
from fedpara_edge.codecs.scales import check_range
from fedpara_edge.codecs.section import Section
from fedpara_edge.codecs.settings import read_settings
from fedpara_edge.factors.layout import TensorSpec
from fedpara_edge.storage.tensorfile import TensorFile

Name = Literal["float16", "bfloat16"]


@dataclass(frozen=True)
class Float16:
    """Encoder with 16 bits per entry before entropy coding.

    Args:
        name: Codec name stored in file headers, `float16` or `bfloat16`.
        version: Codec version stored in file headers.

    Raises:
        InputError: The package zstandard is missing.
    """

    name: Name
    version: int = 1
    unbiased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_zstandard()

    def encode(self, tensors: Sequence[TensorSpec], change: NDArray[np.float32], *, seed: int | None) -> Encoded:  # noqa: ARG002
        """Encode the change rounded to the nearest, with or without a seed."""
        if self.name == "float16":
            check_range(tensors, change, float(np.finfo(np.float16).max))

        def write(_: int, values: NDArray[np.float32], __: NDArray[np.intp], decoded: NDArray[np.float32]) -> bytes:
            bits = _half_bits(values) if self.name == "float16" else _bfloat_bits(values)
            decoded[:] = _widen(bits, self.name)
            rotated = (bits << np.uint16(1)) | (bits >> np.uint16(15))
            low, high = rotated.astype(np.uint8), (rotated >> np.uint16(8)).astype(np.uint8)
            return low.tobytes() + compress(high.tobytes())

        return write_payload(tensors, change, write, block=0, settings={})


def open_float16(
    file: TensorFile, tensors: Sequence[TensorSpec], settings: Mapping[str, Any], *, name: Name
) -> PayloadDecoder:
    """Decoder of a file of either codec.

    Raises:
        InvalidUpdateError: There are settings, or the payload does not fit.
        InputError: The package zstandard is missing.
    """
    read_settings(file, name, settings)
    require_zstandard()

    def read(section: Section, _: NDArray[np.intp], out: NDArray[np.float32]) -> None:
        low = section.take(len(out), "low bytes").astype(np.uint16)
        rotated = low | (decompress(section, len(out)).astype(np.uint16) << np.uint16(8))
        out[:] = _widen((rotated >> np.uint16(1)) | (rotated << np.uint16(15)), name)

    return open_payload(file, tensors, EachAlone(read), block=0)


def _half_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits: NDArray[np.uint16] = values.astype(np.float16).view(np.uint16)
    return bits


def _bfloat_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = values.view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + even) >> np.uint32(16)
    rounded -= ((rounded & np.uint32(0x7FFF)) == 0x7F80).astype(np.uint32)  # infinite
    return rounded.astype(np.uint16)


def _widen(bits: NDArray[np.uint16], name: Name) -> NDArray[np.float32]:
    if name == "bfloat16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    widened: NDArray[np.float32] = bits.view(np.float16).astype(np.float32)
    return widened
