"""What codecs make of one change: its bits by tensor, and codecs side by side in bytes, error and speed."""

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
from fedpara_edge.codecs.codec import Encoded, Encoder, chunks, name_at
from fedpara_edge.codecs.decoding import decode_all
from fedpara_edge.codecs.payload import PayloadDecoder
from fedpara_edge.errors import DivergedError, InvalidUpdateError, WrongBundleError, brief_text
from fedpara_edge.factors.layout import TensorSpec
from fedpara_edge.formats.change import FORMAT as CHANGE_FORMAT
from fedpara_edge.formats.update import FORMAT as UPDATE_FORMAT
from fedpara_edge.formats.weights import Weights
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
"""Codecs worth a comparison."""

_SEED = 1
_FORMAT = "fedpara-edge/comparison"


def open_encoded(path: Path, weights: Weights) -> TensorFile:
    """An update or a published change, open, of the bundle of these weights, whatever round it is of.

    Raises:
        InvalidUpdateError: it is missing, damaged or something else.
        WrongBundleError: it is of another bundle.
    """
    file = TensorFile(path, format=None, error=InvalidUpdateError)
    found, fingerprint = file.header.get("format"), file.header.get("fingerprint")
    if found in (UPDATE_FORMAT, CHANGE_FORMAT) and fingerprint == weights.fingerprint:
        return file
    file.close()
    if found not in (UPDATE_FORMAT, CHANGE_FORMAT):
        raise InvalidUpdateError(
            f"{path}: expected {UPDATE_FORMAT} or {CHANGE_FORMAT}, found {brief_text(found)}", code="wrong_format"
        )
    raise WrongBundleError(
        f"{path}: fingerprint: expected {weights.fingerprint[:12]}…, found {brief_text(fingerprint, most=12)}; give "
        "the weights of its bundle",
        code="wrong_fingerprint",
    )


def read_change(file: TensorFile, tensors: Sequence[TensorSpec]) -> NDArray[np.float32]:
    """The flat change in an open file, of any codec, float32 [entries].

    Raises:
        InvalidUpdateError: the codec is unknown, what it stored does not fit, is damaged or not finite.
    """
    change = decode_all(open_codec(file, tensors), sum(tensor.size for tensor in tensors))
    bad = np.flatnonzero(~np.isfinite(change))
    if bad.size:
        raise InvalidUpdateError(
            f"{file.path}: tensor {name_at(tensors, int(bad[0]))!r}: expected a finite change, found NaN or Inf; "
            "use an update of a training that did not diverge",
            code="not_finite",
        )
    return change


def bits_by_tensor(file: TensorFile, tensors: Sequence[TensorSpec]) -> dict[str, float]:
    """Bits for each entry that an open file spends on each tensor, its header aside.

    Tensors in one chunk share its code. Each is charged with its part of the information in the chunk's symbols: of a
    symbol that makes up the share p of them, -log2 p bits.

    Raises:
        InvalidUpdateError: as `read_change`.
    """
    change, decoder = read_change(file, tensors), open_codec(file, tensors)
    if not isinstance(decoder, PayloadDecoder):
        return {tensor.name: 8 * file.entries[tensor.name].nbytes / max(tensor.size, 1) for tensor in tensors}
    information = np.empty(len(change))
    for number, (start, stop) in enumerate(chunks(len(change))):
        found = _information(change[start:stop], decoder.blocks[number])
        spent = 8.0 * float(decoder.ends[number + 1] - decoder.ends[number])
        information[start:stop] = found * (spent / found.sum()) if found.any() else spent / len(found)
    ends = np.cumsum([tensor.size for tensor in tensors])
    parts = np.split(information, ends[:-1]) if tensors else []
    return {tensor.name: float(part.mean()) if part.size else 0.0 for tensor, part in zip(tensors, parts, strict=True)}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """How one codec did.

    Args:
        codec: as typed.
        bytes: of a file with the change and nothing else in its header.
        bits_per_parameter: of that.
        error: ‖change - decoded‖ / ‖change‖, rounded to the nearest.
        random_error: that with random rounding; None for a codec that has none.
        encode_mb_per_s: float32 in, 10^6 bytes a second, the best of some runs.
        decode_mb_per_s: float32 out, from a file in the system's cache.
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
    """Measure codecs on one change, one after the other, but for those that can't express it.

    Args:
        tensors: the shared tensors, sorted by name.
        change: float32 [entries].
        codecs: as typed, for `find_encoder`.
        seconds: how long to repeat each encoding and decoding.

    Raises:
        InputError: there is no such codec, or a package is missing.
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
    encode_seconds, encoded = _time(lambda: encoder.encode(tensors, change, seed=None), seconds)
    drawn = encoder.encode(tensors, change, seed=_SEED)
    _write(path, encoder, encoded)
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


def _write(path: Path, encoder: Encoder, encoded: Encoded) -> None:
    stated = {"name": encoder.name, "version": encoder.version, **encoded.settings}
    write_tensors(path, encoded.arrays, {"format": _FORMAT, "version": 1, "codec": stated})


def _time(call: Callable[[], Any], seconds: float) -> tuple[float, Any]:
    """The shortest of some calls, which together take that long, and what the last returned."""
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


def _information(values: NDArray[np.float32], lengths: NDArray[np.intp]) -> NDArray[np.float64]:
    """-log2 of the share that the symbol of each entry has among those of a chunk."""
    # Over the largest of a block, values of integers times a scale are as good as the integers.
    tops = np.maximum.reduceat(np.abs(values), np.cumsum(lengths) - lengths)
    symbols = np.rint(values / np.repeat(np.where(tops > 0, tops, 1), lengths) * 2.0**22)
    _, inverse, counts = np.unique(symbols, return_inverse=True, return_counts=True)
    information: NDArray[np.float64] = -np.log2(counts / len(values))[inverse]
    return information
