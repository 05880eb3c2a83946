"""The protocol of a codec: an encoder of changes, and a decoder for each file that holds one.

The *flat change* is all shared tensors in the order of their names, running statistics after all others, each in C
order, end to end, as float32 [entries]. It is cut into *chunks* of `CHUNK_ENTRIES` entries, the last one shorter. Each
chunk decodes on its own, so that an aggregation needs no memory per update and several threads can share the work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.factors.layout import STATISTICS, TensorSpec
from fedpara_edge.storage.tensorfile import TensorFile

CHUNK_ENTRIES = 1 << 16

Number = TypeVar("Number", bound=np.number)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A change in the form in which a codec stores it.

    Args:
        arrays: Arrays to store, by name.
        decoded: Flat change that every reader will get, float32 [entries].
        settings: Header fields of the codec besides its name and version, as plain JSON data.
        sums: Sums of what the chunks are stored in (`sums`).
    """

    arrays: Mapping[str, NDArray[Any]]
    decoded: NDArray[np.float32]
    settings: Mapping[str, Any] = field(default_factory=dict)
    sums: Sequence[int] = ()


class Encoder(Protocol):
    """A codec with its options, ready to encode."""

    @property
    def name(self) -> str:
        """Codec name stored in file headers."""
        ...

    @property
    def version(self) -> int:
        """Codec version stored in file headers."""
        ...

    @property
    def unbiased(self) -> bool:
        """Whether the expectation of the decoded change, over seeds, is the change itself."""
        ...

    def encode(self, tensors: Sequence[TensorSpec], change: NDArray[np.float32], *, seed: int | None) -> Encoded:
        """Encode a flat change; equal arguments give equal bytes.

        Args:
            tensors: Shared tensors, in the order of the flat change.
            change: Flat change, float32 [entries], finite.
            seed: Seed of random rounding, for codecs that have it; None to round to the nearest, for the smallest
                error, where what the codec leaves out is added to the next change (error feedback).

        Raises:
            DivergedError: The change is too large for the codec to express.
        """
        ...


class Decoder(Protocol):
    """Reader of the change in one file, safe for use by several threads at once."""

    def decode(self, start: int, out: NDArray[np.float32]) -> None:
        """Decode a chunk.

        Args:
            start: Number of the chunk's first entry in the flat change.
            out: Array to fill, float32 of the chunk's length.

        Raises:
            InvalidUpdateError: The stored data is damaged.
        """
        ...


class Opener(Protocol):
    """Function that opens files of one version of a codec."""

    def __call__(self, file: TensorFile, tensors: Sequence[TensorSpec], settings: Mapping[str, Any]) -> Decoder:
        """Compare what is stored with what the tensors need, from the header alone.

        Args:
            file: Open file.
            tensors: Shared tensors, in the order of the flat change.
            settings: Header fields of the codec besides its name and version.

        Raises:
            InvalidUpdateError: A name, shape, dtype or setting does not fit.
        """
        ...


def in_order(tensors: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Tensors in the order of the flat change."""
    return sorted(tensors, key=lambda tensor: (tensor.part in STATISTICS, tensor.name))


def name_at(tensors: Sequence[TensorSpec], position: int) -> str:
    """Name of the tensor that holds entry `position` of the flat change; tensors in that order."""
    ends = np.cumsum([tensor.size for tensor in tensors])
    return tensors[int(np.searchsorted(ends, position, side="right"))].name


def spelled_range(tensors: Sequence[TensorSpec], start: int, stop: int) -> str:
    """Tensors that hold the entries of a range of the flat change, in words; tensors in that order."""
    first, last = name_at(tensors, start), name_at(tensors, stop - 1)
    return f"tensor {first!r}" if first == last else f"tensors {first!r} to {last!r}"


def not_finite(tensors: Mapping[str, NDArray[Any]]) -> str | None:
    """Name of the first tensor with an entry that is NaN or infinite; None if all are finite."""
    return next((name for name, tensor in tensors.items() if not np.isfinite(tensor).all()), None)


def chunks(entries: int) -> Iterator[tuple[int, int]]:
    """Ranges (start, stop) of all chunks of a flat change.

    >>> list(chunks(100_000))
    [(0, 65536), (65536, 100000)]
    """
    for start in range(0, entries, CHUNK_ENTRIES):
        yield start, min(start + CHUNK_ENTRIES, entries)


def flatten(tensors: Sequence[TensorSpec], values: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    """Flat vector of some tensors, in order: a new array, float32 [entries]."""
    parts = [np.asarray(values[tensor.name], np.float32).reshape(-1) for tensor in tensors]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def unflatten(tensors: Sequence[TensorSpec], flat: NDArray[Number]) -> dict[str, NDArray[Number]]:
    """Inverse of `flatten`: views of a flat vector, by tensor name."""
    ends = np.cumsum([tensor.size for tensor in tensors])
    parts = np.split(flat, ends[:-1]) if tensors else []
    return {tensor.name: part.reshape(tensor.shape) for tensor, part in zip(tensors, parts, strict=True)}
