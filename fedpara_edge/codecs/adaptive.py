"""The codec `adaptive`: `uniform` with the step that meets a target of bytes or error; it writes files of `uniform`.

One step for all entries gives the same squared error to every tensor that is sent at all, and more bits to a tensor
with larger changes: log2 of their ratio. That is the allocation of least error for the bytes (reverse water-filling:
Cover and Thomas, Elements of Information Theory, section 10.3.3); equal bits for all tensors would spend as many on
those that barely changed.

It does not claim to be unbiased: a draw that misses the target is repeated with another step, so that with a seed a
small byte target favours small draws.

The step is found by bisection of its logarithm, for large changes on a sample of the chunks. Finer steps cost more
bytes and leave less error, so the target is met to within one per cent, or a few where a sample stands for all chunks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.codecs.codec import Encoded, chunks
from fedpara_edge.codecs.payload import NAME as PAYLOAD
from fedpara_edge.codecs.rounding import generator, round_randomly, round_to_nearest
from fedpara_edge.codecs.scales import check_range
from fedpara_edge.codecs.sparse import LARGEST, encode_sparse
from fedpara_edge.codecs.uniform import NAME, VERSION, dead_zone, encode_uniform, root_mean_square
from fedpara_edge.errors import InputError
from fedpara_edge.factors.layout import TensorSpec
from fedpara_edge.options import check, option

_FINEST, _COARSEST = 2.0**-10, 2.0**20
_MIN_ERROR = 5e-4  # the finest step leaves up to 2^-10 / √6 with random rounding
_HALVINGS = 12
_NUDGE = 1.01
_SAMPLED_CHUNKS = 8


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """Encoder that chooses the step of `uniform` for each change so as to meet a target.

    Args:
        bytes: Largest payload in bytes, or the smallest possible if even that is larger; the header of an update takes
            about 500 bytes more. 0 for no such target.
        error: Largest relative error ‖change - decoded‖ / ‖change‖, at least 0.0005. 0 for no such target.
        name: Codec name stored in file headers.
        version: Codec version stored in file headers.

    Raises:
        InputError: Not exactly one of the two targets is given, or it is out of range.
    """

    bytes: int = option(0, minimum=0, help="Largest payload of an update, in bytes.")
    error: float = option(0.0, minimum=0, below=1, help="Largest relative error of a change.")
    name: str = NAME
    version: int = VERSION
    unbiased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check(self)
        if 0 < self.error < _MIN_ERROR:
            raise InputError(f"expected at least {_MIN_ERROR}, found {self.error}; use float16 or float32", key="error")
        if (self.bytes > 0) == (self.error > 0):
            raise InputError(
                "expected either bytes, a positive integer, or error, a number between 0 and 1, found "
                f"bytes {self.bytes} and error {self.error:g}"
            )

    def encode(self, tensors: Sequence[TensorSpec], change: NDArray[np.float32], *, seed: int | None) -> Encoded:
        """Encode with the coarsest step whose error is small enough, or the finest whose payload is."""
        check_range(tensors, change)
        sample = _sample(change)
        size, share = root_mean_square(change), len(change) / max(sum(map(len, sample)), 1)
        norm = math.sqrt(sum(float(np.sum(np.square(part, dtype=np.float64))) for part in sample))

        def fits(step: float) -> bool:
            if self.bytes:
                return share * _measure_bytes(sample, step, size, seed) <= self.bytes
            return _measure_error(sample, step, size, seed) <= self.error * norm

        # A byte target asks for the finest step that fits, an error target for the coarsest.
        low, high = math.log2(_FINEST), math.log2(_COARSEST)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if fits(2**middle) == bool(self.bytes):
                high = middle
            else:
                low = middle
        step, nudge = 2 ** (high if self.bytes else low), _NUDGE
        while True:
            encoded = encode_uniform(tensors, change, step * size, seed=seed, zone=dead_zone(step))
            if self._is_met(encoded, change) or not _FINEST < step < _COARSEST:
                return encoded
            step *= nudge if self.bytes else 1 / nudge  # the sample was a little too optimistic
            nudge *= nudge

    def _is_met(self, encoded: Encoded, change: NDArray[np.float32]) -> bool:
        if self.bytes:
            return encoded.arrays[PAYLOAD].nbytes <= self.bytes
        distance = np.linalg.norm(np.subtract(encoded.decoded, change, dtype=np.float64))
        return bool(distance <= self.error * np.linalg.norm(change.astype(np.float64)))


def _sample(change: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """All chunks, or a few spaced evenly over the change."""
    ranges = list(chunks(len(change)))
    return [change[start:stop] for start, stop in ranges[:: -(-len(ranges) // _SAMPLED_CHUNKS) or 1]]


def _measure_bytes(sample: Sequence[NDArray[np.float32]], step: float, size: float, seed: int | None) -> int:
    """Payload bytes of some chunks, for a step relative to `size`, the root mean square of the change."""
    return sum(6 + len(encode_sparse(found.astype(np.int32))) for found, _ in _rounded(sample, step, size, seed))


def _measure_error(sample: Sequence[NDArray[np.float32]], step: float, size: float, seed: int | None) -> float:
    """Distance between some chunks and their decoded values, for a step relative to `size`."""
    squares = (
        np.sum(np.square(found - ratios, dtype=np.float64)) for found, ratios in _rounded(sample, step, size, seed)
    )
    return step * size * math.sqrt(sum(map(float, squares)))


def _rounded(
    sample: Sequence[NDArray[np.float32]], step: float, size: float, seed: int | None
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    random = (
        None if seed is None else generator(0)
    )  # not the draws to be sent, which must not influence the choice of their step
    for values in sample:
        ratios = values / (np.float32(step * size) or np.float32(1))
        found = round_to_nearest(ratios, dead_zone(step)) if random is None else round_randomly(ratios, random)
        yield np.clip(found, -LARGEST, LARGEST), ratios
