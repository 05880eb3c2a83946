"""Content of an encoded file, an update or a published change: the change, and the bits that each tensor takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.codecs import open_codec
from fedpara_edge.codecs.codec import chunks, not_finite, unflatten
from fedpara_edge.codecs.decoding import decode_all
from fedpara_edge.codecs.payload import PayloadDecoder
from fedpara_edge.codecs.statistics import StatisticsDecoder, without_statistics
from fedpara_edge.errors import InvalidUpdateError, WrongBundleError, brief_text
from fedpara_edge.factors.layout import TensorSpec
from fedpara_edge.formats.change import FORMAT as CHANGE_FORMAT
from fedpara_edge.formats.update import FORMAT as UPDATE_FORMAT
from fedpara_edge.formats.weights import Weights
from fedpara_edge.storage.tensorfile import TensorFile


def open_encoded(path: Path, weights: Weights) -> TensorFile:
    """Open an update or a published change of the same bundle as some weights, of any round.

    Raises:
        InvalidUpdateError: The file is missing, damaged or something else.
        WrongBundleError: The file belongs to another bundle.
    """
    file = TensorFile(path, format=None, error=InvalidUpdateError)
    found, fingerprint = file.header.get("format"), file.header.get("fingerprint")
    if found in (UPDATE_FORMAT, CHANGE_FORMAT) and fingerprint == weights.fingerprint:
        return file
    file.close()
    if found not in (UPDATE_FORMAT, CHANGE_FORMAT):
        raise InvalidUpdateError(
            f"{path}: expected {UPDATE_FORMAT} or {CHANGE_FORMAT}, found {brief_text(found)}; check the path",
            code="wrong_format",
        )
    raise WrongBundleError(
        f"{path}: fingerprint: expected {weights.fingerprint[:12]}…, found {brief_text(fingerprint, max_length=12)}; "
        "use weights of the same bundle",
        code="wrong_fingerprint",
    )


def read_change(file: TensorFile, tensors: Sequence[TensorSpec]) -> NDArray[np.float32]:
    """Flat change in an open file of any codec, float32 [entries].

    Raises:
        InvalidUpdateError: The codec is unknown, or the stored data does not fit, is damaged or not finite.
    """
    change = decode_all(open_codec(file, tensors), sum(tensor.size for tensor in tensors))
    if (bad := not_finite(unflatten(tensors, change))) is not None:
        raise InvalidUpdateError(
            f"{file.path}: tensor {bad!r}: expected a finite change, found NaN or Inf; "
            "use an update of a training that did not diverge",
            code="not_finite",
        )
    return change


def bits_by_tensor(file: TensorFile, tensors: Sequence[TensorSpec]) -> dict[str, float]:
    """Bits per entry that an open file spends on each tensor, its header not counted.

    The tensors in a chunk share its code. Each is charged with its part of the information in the chunk's symbols:
    -log2 p bits for a symbol that makes up a fraction p of them.

    Raises:
        InvalidUpdateError: The codec is unknown, or the stored data does not fit, is damaged or not finite.
    """
    change, decoder, apart = read_change(file, tensors), open_codec(file, tensors), dict[str, float]()
    if isinstance(decoder, StatisticsDecoder):
        apart = dict.fromkeys((tensor.name for tensor in tensors[len(without_statistics(tensors)) :]), decoder.bits)
        change, tensors, decoder = change[: decoder.entries], without_statistics(tensors), decoder.trained
    if not isinstance(decoder, PayloadDecoder):
        return {tensor.name: 8 * file.entries[tensor.name].nbytes / max(tensor.size, 1) for tensor in tensors}
    information = np.empty(len(change))
    for number, (start, stop) in enumerate(chunks(len(change))):
        found = _information(change[start:stop], decoder.blocks[number])
        spent = 8.0 * float(decoder.ends[number + 1] - decoder.ends[number])
        information[start:stop] = found * (spent / found.sum()) if found.any() else spent / len(found)
    ends = np.cumsum([tensor.size for tensor in tensors])
    parts = np.split(information, ends[:-1]) if tensors else []
    means = {t.name: float(part.mean()) if part.size else 0.0 for t, part in zip(tensors, parts, strict=True)}
    return {**means, **apart}


def _information(values: NDArray[np.float32], lengths: NDArray[np.intp]) -> NDArray[np.float64]:
    """Information of each entry of a chunk: -log2 of the fraction of entries with the same symbol."""
    # Relative to the largest of their block, integers times a scale tell as much as the integers.
    tops = np.maximum.reduceat(np.abs(values), np.cumsum(lengths) - lengths)
    symbols = np.rint(values / np.repeat(np.where(tops > 0, tops, 1), lengths) * 2.0**22)
    _, inverse, counts = np.unique(symbols, return_inverse=True, return_counts=True)
    information: NDArray[np.float64] = -np.log2(counts / len(values))[inverse]
    return information
