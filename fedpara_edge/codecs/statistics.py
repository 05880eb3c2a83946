"""Running statistics in an encoded change, which come last in it and are stored apart, whatever the codec.

They are few, and differ from the weights by orders of magnitude: in a block or a threshold with weights, one of both
would drown. Nor does error feedback suit them: a training moves them all the way to what its data say, so that what is
left out of one change is in the next one anyway, and would count twice. The factors of an update have no error feedback
either, as the next one has other directions.

Stored beside the arrays of the codec, if the bundle's layout has running statistics that travel:

    statistics    float16 [entries], rounded towards zero; float32 if one of them is beyond float16

Rounded so, no variance that was not negative becomes so. `float32` stores them as any tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.codecs.codec import Decoder, Encoded, Encoder, chunks
from fedpara_edge.codecs.float32 import Float32
from fedpara_edge.codecs.payload import STATISTICS as NAME
from fedpara_edge.codecs.sums import damaged, read_sums, sum_of
from fedpara_edge.errors import InvalidUpdateError
from fedpara_edge.factors.layout import STATISTICS, UPDATE, TensorSpec
from fedpara_edge.storage.tensorfile import TensorFile


def encode_change(
    encoder: Encoder, tensors: Sequence[TensorSpec], change: NDArray[np.float32], *, seed: int | None
) -> Encoded:
    """Encode a flat change that may have running statistics at its end (`codec.Encoder.encode`).

    Raises:
        DivergedError: The change is too large for the codec to express.
    """
    trained = without_statistics(tensors)
    entries = sum(tensor.size for tensor in trained)
    if entries == len(change) or encoder.name == Float32.name:
        return encoder.encode(tensors, change, seed=seed)
    encoded, stored = encoder.encode(trained, change[:entries], seed=seed), _towards_zero(change[entries:])
    return Encoded(
        arrays={**encoded.arrays, NAME: stored},
        decoded=np.concatenate([encoded.decoded, stored.astype(np.float32)]),
        settings=encoded.settings,
        sums=[*encoded.sums, sum_of(stored)],
    )


def left_out(
    tensors: Sequence[TensorSpec],
    change: Mapping[str, NDArray[np.float32]],
    decoded: Mapping[str, NDArray[np.float32]],
) -> dict[str, NDArray[np.float32]]:
    """Residual of an encoded change by tensor, for error feedback: of statistics and updates, nothing.

    Args:
        tensors: Shared tensors.
        change: Change before it was encoded, by name.
        decoded: Change that every reader gets, by name.
    """
    return {
        tensor.name: np.zeros(tensor.shape, np.float32)
        if tensor.part in STATISTICS | UPDATE
        else change[tensor.name] - decoded[tensor.name]
        for tensor in tensors
    }


def without_statistics(tensors: Sequence[TensorSpec]) -> Sequence[TensorSpec]:
    """Shared tensors in the order of the flat change, but for the running statistics at its end."""
    return [tensor for tensor in tensors if tensor.part not in STATISTICS]


@dataclass(frozen=True)
class StatisticsDecoder:
    """Decoder of a change with running statistics at its end.

    Args:
        trained: Decoder of all that comes before them.
        entries: Number of entries before them.
        file: Open file.
    """

    trained: Decoder
    entries: int
    file: TensorFile

    @property
    def bits(self) -> float:
        """Bits of a statistic."""
        return 8.0 * np.dtype(self.file.entries[NAME].dtype).itemsize

    def decode(self, start: int, out: NDArray[np.float32]) -> None:
        """Decode a chunk, of which any part may be statistics."""
        count = min(max(self.entries - start, 0), len(out))
        if count:
            self.trained.decode(start, out[:count])
        if count < len(out):
            entry = self.file.entries[NAME]
            stored = np.empty(len(out) - count, entry.dtype)
            self.file.read_into(entry.offset + stored.itemsize * (start + count - self.entries), stored)
            out[count:] = stored


def check_statistics(file: TensorFile, tensors: Sequence[TensorSpec]) -> None:
    """Compare the statistics that a file holds with those that its layout has.

    Raises:
        InvalidUpdateError: They are missing, too many, or of another dtype.
    """
    entries = sum(tensor.size for tensor in tensors if tensor.part in STATISTICS)
    found = file.entries.get(NAME)
    fits = found is not None and found.shape == (entries,) and found.dtype in ("float16", "float32")
    if not (fits if entries else found is None):
        expected = f"{NAME!r} of float16 or float32 [{entries}]" if entries else f"no {NAME!r}"
        stored = "none" if found is None else f"{found.dtype} {list(found.shape)}"
        raise InvalidUpdateError(
            f"{file.path}: expected {expected}, found {stored}; write it again with the bundle that it names",
            code="payload",
        )


def check_sum_of_statistics(file: TensorFile, entries: int) -> None:
    """Compare the sum of the statistics that a file holds with the last one that it states, if it does.

    Args:
        file: Open file.
        entries: Number of entries of the flat change before them.

    Raises:
        InvalidUpdateError: They differ.
    """
    sums = read_sums(file, len(list(chunks(entries))) + 1)
    if sums is not None and int(sums[-1]) != sum_of(file.read(NAME)):
        raise damaged(file, NAME)


def _towards_zero(values: NDArray[np.float32]) -> NDArray[np.float16] | NDArray[np.float32]:
    if np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        return values
    rounded = values.astype(np.float16)
    too_far = np.abs(rounded.astype(np.float32)) > np.abs(values)
    return np.where(too_far, np.nextafter(rounded, np.float16(0)), rounded)
