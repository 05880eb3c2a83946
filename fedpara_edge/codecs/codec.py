"""What a codec is: an encoder of changes, and a decoder for each file that holds one.

The *flat change* is all shared tensors, in the order of their names, each in C order, end to end, as float32 [entries].
It is cut into *chunks* of `CHUNK_ENTRIES` entries, the last one shorter, each of which decodes on its own: so an
aggregation needs no memory per update, and several threads can share the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.codecs.changes import BlockScales
from fedpara_edge.codecs.section import DamageError
from fedpara_edge.errors import InvalidUpdateError
from fedpara_edge.layout import TensorSpec
from fedpara_edge.tensorfile import TensorFile

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


class Arithmetic(Protocol):
    """How values follow from what was loaded. Equal ones serve chunks of several files in one go."""

    def compute(self, start: int, loaded: Sequence[Any], out: NDArray[np.float32]) -> BlockScales:
        """Compute the chunk at `start` of some files, whose tensors are the same.

        Args:
            start: entry of the flat change.
            loaded: of each file, the `Pending.loaded` that names this arithmetic or an equal one.
            out: float32 [files, entries of the chunk], to be filled with integers.

        Returns:
            What they are still to be multiplied with.

        Raises:
            DamageError: what was loaded of one of the files makes no sense.
        """
        ...


@dataclass(frozen=True)
class Pending:
    """A chunk that was read, whose values are still to be computed.

    Args:
        arithmetic: computes them.
        loaded: of what.
        refusal: the error of the file if it turns out to be damaged.
    """

    arithmetic: Arithmetic
    loaded: Any
    refusal: Callable[[DamageError], InvalidUpdateError]


class Decoder(Protocol):
    """The change in one file, to be read by several threads at once; `decoding` has the functions to read it with."""

    def load(self, start: int, out: NDArray[np.float32]) -> Pending | None:
        """Read and check the chunk of the flat change that starts at `start`.

        Args:
            start: entry of the flat change.
            out: float32 of the chunk's length, filled unless something is returned.

        Returns:
            What is left to do, if it pays to do it for several files together.

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
