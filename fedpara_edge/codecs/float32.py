"""The codec `float32`, version 1: the change as it is.

Stored: one float32 tensor for every shared tensor, under its own name and shape. As all have one dtype, safetensors
lays them end to end by name: the data of the file, from its first tensor on, is the flat change in little-endian
float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.errors import InvalidUpdateError
from fedpara_edge.layout import TensorSpec
from fedpara_edge.tensorfile import TensorFile


class Float32:
    """Lossless; 4 bytes for each entry."""

    name = "float32"
    version = 1

    def encode(
        self, tensors: Sequence[TensorSpec], change: Mapping[str, NDArray[np.float32]]
    ) -> dict[str, NDArray[Any]]:
        """The change itself, by tensor."""
        return {tensor.name: np.asarray(change[tensor.name], np.float32) for tensor in tensors}

    def check(self, file: TensorFile, tensors: Sequence[TensorSpec]) -> None:
        """Every shared tensor is there as float32 in its own shape, and nothing else is.

        Raises:
            InvalidUpdateError: the first tensor that differs.
        """
        expected = {tensor.name: ("float32", tensor.shape) for tensor in tensors}
        found = {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise InvalidUpdateError(
                    f"{file.path}: tensor {name!r}: expected {_text(expected.get(name))}, "
                    f"found {_text(found.get(name))}; train again with the bundle of these weights"
                )

    def pieces(self, tensors: Sequence[TensorSpec], limit: int) -> Iterator[tuple[int, int]]:
        """Even ranges of at most `limit` entries."""
        total = sum(tensor.size for tensor in tensors)
        for start in range(0, total, limit):
            yield start, min(start + limit, total)

    def decode(self, file: TensorFile, start: int, out: NDArray[np.float32]) -> None:
        """Read the range straight into `out`."""
        first = next(iter(file.entries.values())).offset
        file.read_into(first + 4 * start, out)


def _text(stored: tuple[str, tuple[int, ...]] | None) -> str:
    return "none" if stored is None else f"{stored[0]} {list(stored[1])}"
