"""The codec `topk`, version 1: the largest entries, and zero for all others.

No settings. The section of a chunk (`payload`) is

    low, step   bfloat16 each (`scales`)
    integers    `sparse`

and an entry is 0 for the integer 0, and otherwise sign(i) (low + (|i| - 1) step): the entries that are kept are rounded
to the nearest of 2^bits magnitudes from the smallest to the largest of them in the chunk. So the error of a kept entry
is never larger than its magnitude, and this is a contraction: ‖x - decoded‖ < ‖x‖. It is biased, with or without a
seed: it is made for error feedback.

Source: Stich et al., Sparsified SGD with Memory (arXiv 1809.07599).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.codecs.codec import Encoded
from fedpara_edge.codecs.payload import EachAlone, PayloadDecoder, open_payload, write_payload
from fedpara_edge.codecs.scales import check_range, from_bytes, round_down, round_up, to_bytes
from fedpara_edge.codecs.section import Section
from fedpara_edge.codecs.settings import read_settings
from fedpara_edge.codecs.sparse import decode_sparse, encode_sparse
from fedpara_edge.factors.layout import TensorSpec
from fedpara_edge.options import check, option
from fedpara_edge.storage.tensorfile import TensorFile


@dataclass(frozen=True, kw_only=True)
class TopK:
    """Encoder that keeps only the largest entries (sparsification).

    Args:
        share: Fraction of all entries to keep, in (0, 1]; entries as large as the smallest of them are kept as well.
        bits: Bits per magnitude before entropy coding.
        name: Codec name stored in file headers.
        version: Codec version stored in file headers.

    Raises:
        InputError: An option is out of range.
    """

    share: float = option(0.05, above=0, maximum=1, help="Fraction of all entries to keep.")
    bits: int = option(3, minimum=1, maximum=8, help="Bits per magnitude, before entropy coding.")
    name: str = "topk"
    version: int = 1
    unbiased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check(self)

    def encode(self, tensors: Sequence[TensorSpec], change: NDArray[np.float32], *, seed: int | None) -> Encoded:  # noqa: ARG002
        """Encode the largest entries of the whole change, at least one; the seed makes no difference."""
        check_range(tensors, change)
        magnitudes = np.abs(change)
        left_out = min(int((1 - self.share) * len(change)), len(change) - 1)
        threshold = np.partition(magnitudes, left_out)[left_out] if len(change) else 0

        def write(_: int, values: NDArray[np.float32], __: NDArray[np.intp], decoded: NDArray[np.float32]) -> bytes:
            sizes = np.abs(values)
            kept = (sizes >= threshold) & (sizes > 0)
            found = sizes[kept]
            low = round_down(found.min(initial=np.inf) if found.size else 0.0)
            step = round_up(np.array([(found.max(initial=0) - low) / ((1 << self.bits) - 1)]))[0]
            levels = np.rint((found - low) / (step or 1)).astype(np.int32)
            integers = np.zeros(len(values), np.int32)
            integers[kept] = np.copysign(levels + 1, values[kept]).astype(np.int32)
            _place(np.flatnonzero(integers), integers[integers != 0], low, step, decoded)
            return to_bytes(np.array([low, step])) + encode_sparse(integers)

        return write_payload(tensors, change, write, block=0, settings={})


def open_topk(file: TensorFile, tensors: Sequence[TensorSpec], settings: Mapping[str, Any]) -> PayloadDecoder:
    """Decoder of a `topk` file.

    Raises:
        InvalidUpdateError: There are settings, or the payload does not fit.
    """
    read_settings(file, "topk", settings)

    def read(section: Section, _: NDArray[np.intp], out: NDArray[np.float32]) -> None:
        low, step = from_bytes(section.take(4, "scales"))
        _place(*decode_sparse(section, len(out)), low, step, out)

    return open_payload(file, tensors, EachAlone(read), block=0)


def _place(
    positions: NDArray[np.integer],
    integers: NDArray[np.int32],
    low: np.float32,
    step: np.float32,
    out: NDArray[np.float32],
) -> None:
    magnitudes = (np.abs(integers) - 1).astype(np.float32)
    magnitudes *= step
    magnitudes += low
    out.fill(0)
    out[positions] = np.copysign(magnitudes, integers.astype(np.float32))
