"""What a codec is: an encoder of changes, and a decoder for each file that holds one.

The *flat change* is all shared tensors, in the order of their names, each in C order, end to end, as float32 [entries].
It is cut into *chunks* of `CHUNK_ENTRIES` entries, the last one shorter, each of which decodes on its own: so an
aggregation needs no memory per update, and several threads can share the work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.factors.layout import TensorSpec
from fedpara_edge.storage.tensorfile import TensorFile

CHUNK_ENTRIES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A change as a codec stores it.

    Args:
        arrays: what to store, by name.
        decoded: the flat change that every reader will get, float32 [entries].
        settings: what the header states besides the codec's name and version, plain JSON data.
    """

    arrays: Mapping[str, NDArray[Any]]
    decoded: NDArray[np.float32]
    settings: Mapping[str, Any] = field(default_factory=dict)


class Encoder(Protocol):
    """A codec with its options, ready to encode."""

    @property
    def name(self) -> str:
        """Under which files name the codec."""
        ...

    @property
    def version(self) -> int:
        """Of what it writes."""
        ...

    @property
    def unbiased(self) -> bool:
        """Whether, with a seed, the expectation of what is decoded is the change."""
        ...

    def encode(self, tensors: Sequence[TensorSpec], change: NDArray[np.float32], *, seed: int | None) -> Encoded:
        """Encode a flat change; equal arguments give equal bytes.

        Args:
            tensors: the shared tensors, sorted by name.
            change: float32 [entries], finite.
            seed: of random rounding, for a codec that has it; None to round to the nearest, for the smallest error,
                where what is left over is kept for the next time (error feedback).

        Raises:
            DivergedError: the change is too large to be expressed.
        """
        ...


class Decoder(Protocol):
    """The change in one file, to be read by several threads at once."""

    def decode(self, start: int, out: NDArray[np.float32]) -> None:
        """Decode a chunk.

        Args:
            start: entry of the flat change where it starts.
            out: float32 of the chunk's length, to be filled.

        Raises:
            InvalidUpdateError: what is stored is damaged.
        """
        ...


class Opener(Protocol):
    """How a version of a codec is read."""

    def __call__(self, file: TensorFile, tensors: Sequence[TensorSpec], settings: Mapping[str, Any]) -> Decoder:
        """Compare what is stored with what the tensors need, from the header alone.

        Args:
            file: the open file.
            tensors: the shared tensors, sorted by name.
            settings: what the header states of the codec besides its name and version.

        Raises:
            InvalidUpdateError: a name, shape, dtype or setting does not fit.
        """
        ...


def in_order(tensors: Iterable[TensorSpec]) -> list[TensorSpec]:
    """The tensors in the order of the flat change."""
    return sorted(tensors, key=lambda tensor: tensor.name)


def name_at(tensors: Sequence[TensorSpec], position: int) -> str:
    """Name of the tensor, of those sorted by name, in which entry `position` of the flat change lies."""
    ends = np.cumsum([tensor.size for tensor in tensors])
    return tensors[int(np.searchsorted(ends, position, side="right"))].name


def chunks(entries: int) -> Iterator[tuple[int, int]]:
    """The ranges (start, stop) of all chunks.

    >>> list(chunks(100_000))
    [(0, 65536), (65536, 100000)]
    """
    for start in range(0, entries, CHUNK_ENTRIES):
        yield start, min(start + CHUNK_ENTRIES, entries)


def flatten(tensors: Sequence[TensorSpec], values: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    """The flat vector of some tensors, sorted by name; a new array, float32 [entries]."""
    parts = [np.asarray(values[tensor.name], np.float32).reshape(-1) for tensor in tensors]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def unflatten(tensors: Sequence[TensorSpec], flat: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """The inverse of `flatten`: views of a flat vector, by tensor."""
    ends = np.cumsum([tensor.size for tensor in tensors])
    parts = np.split(flat, ends[:-1]) if tensors else []
    return {tensor.name: part.reshape(tensor.shape) for tensor, part in zip(tensors, parts, strict=True)}
