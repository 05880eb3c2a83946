"""Comparison of codecs on one change: bytes, error and speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.codecs import find_encoder, open_codec
from fedpara_edge.codecs.codec import Encoder
from fedpara_edge.codecs.decoding import decode_all
from fedpara_edge.codecs.statistics import encode_change
from fedpara_edge.errors import DivergedError, InvalidUpdateError
from fedpara_edge.factors.layout import TensorSpec
from fedpara_edge.storage.tensorfile import TensorFile, write_tensors

USUAL = (
    "float32",
    "float16",
    "bfloat16",
    "int8",
    "int4",
    "int3",
    "int2",
    "rotated:bits=4",
    "rotated:bits=3",
    "rotated:bits=2",
    "topk:share=0.1",
    "topk:share=0.03",
    "topk:share=0.01",
    "uniform:step=0.5",
    "uniform:step=1",
    "uniform:step=2",
    "uniform:step=3",
    "uniform:step=4",
)
"""Codecs that are compared by default."""

_SEED = 1
_FORMAT = "fedpara-edge/comparison"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measurements of one codec.

    Args:
        codec: Codec as text, with its options.
        bytes: Size of a file with the change and nothing else in its header.
        bits_per_parameter: Bits of that file per entry of the change.
        error: Relative error ‖change - decoded‖ / ‖change‖ with rounding to the nearest.
        random_error: The same without bias, as a device without a state encodes; None for a codec that can't.
        encode_mb_per_s: Encoding speed in 10^6 bytes of float32 per second, the best of several runs.
        decode_mb_per_s: Decoding speed in 10^6 bytes of float32 per second, from a file in the system's cache.
    """

    codec: str
    bytes: int
    bits_per_parameter: float
    error: float
    random_error: float | None
    encode_mb_per_s: float
    decode_mb_per_s: float

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`."""
        return asdict(self)


def compare(
    tensors: Sequence[TensorSpec], change: NDArray[np.float32], codecs: Sequence[str], *, seconds: float = 0.1
) -> Iterator[Measured]:
    """Measure codecs on one change, one after the other, leaving out those that can't express it.

    Args:
        tensors: Shared tensors, in the order of the flat change.
        change: Flat change, float32 [entries].
        codecs: Codecs as text, for `find_encoder`.
        seconds: Time for which to repeat each encoding and each decoding.

    Raises:
        InputError: A codec is unknown, or a package is missing.
    """
    encoders = {codec: find_encoder(codec) for codec in codecs}
    with TemporaryDirectory(prefix="codecs-") as folder:
        for codec, encoder in encoders.items():
            with suppress(DivergedError):
                yield _measure(codec, encoder, tensors, change, Path(folder) / "change", seconds)


def _measure(
    codec: str,
    encoder: Encoder,
    tensors: Sequence[TensorSpec],
    change: NDArray[np.float32],
    path: Path,
    seconds: float,
) -> Measured:
    encode_seconds, encoded = _time(lambda: encode_change(encoder, tensors, change, seed=None), seconds)
    drawn = encode_change(encoder, tensors, change, seed=_SEED)
    stated = {"name": encoder.name, "version": encoder.version, **encoded.settings}
    write_tensors(path, encoded.arrays, {"format": _FORMAT, "version": 1, "codec": stated})
    with TensorFile(path, format=_FORMAT, error=InvalidUpdateError) as file:
        decoder = open_codec(file, tensors)
        decode_seconds, _ = _time(lambda: decode_all(decoder, len(change)), seconds)
    size = path.stat().st_size
    error, random_error = (_relative(found.decoded, change) for found in (encoded, drawn))
    return Measured(
        codec=codec,
        bytes=size,
        bits_per_parameter=8 * size / max(len(change), 1),
        error=error,
        random_error=None if np.array_equal(encoded.decoded, drawn.decoded) else random_error,
        encode_mb_per_s=change.nbytes / 1e6 / encode_seconds,
        decode_mb_per_s=change.nbytes / 1e6 / decode_seconds,
    )


def _time(call: Callable[[], Any], seconds: float) -> tuple[float, Any]:
    """Time of the fastest of several calls, which together take `seconds`, and the result of the last."""
    best, started = float("inf"), time.perf_counter()
    while True:
        begun = time.perf_counter()
        result = call()
        ended = time.perf_counter()
        best = min(best, ended - begun)
        if ended - started > seconds:
            return best, result


def _relative(decoded: NDArray[np.float32], change: NDArray[np.float32]) -> float:
    norm = float(np.linalg.norm(change.astype(np.float64)))
    return float(np.linalg.norm(np.subtract(decoded, change, dtype=np.float64))) / norm if norm else 0.0
