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
        """Every shared tensor is there as float32 in its own shape, in the order of names, and nothing else is.

        Raises:
            InvalidUpdateError: the first tensor that differs.
        """
        expected = [(tensor.name, ("float32", tensor.shape)) for tensor in sorted(tensors, key=lambda t: t.name)]
        found = [(name, (entry.dtype, entry.shape)) for name, entry in file.entries.items()]
        if expected != found:
            raise _difference(file, dict(expected), dict(found))

    def pieces(self, tensors: Sequence[TensorSpec], limit: int) -> Iterator[tuple[int, int]]:
        """Even ranges of at most `limit` entries."""
        total = sum(tensor.size for tensor in tensors)
        for start in range(0, total, limit):
            yield start, min(start + limit, total)

    def decode(self, file: TensorFile, start: int, out: NDArray[np.float32]) -> None:
        """Read the range straight into `out`."""
        file.read_into(file.data_offset + 4 * start, out)


_Stored = tuple[str, tuple[int, ...]]


def _difference(file: TensorFile, expected: Mapping[str, _Stored], found: Mapping[str, _Stored]) -> InvalidUpdateError:
    for name in sorted(expected.keys() | found.keys()):
        wanted, stored = expected.get(name), found.get(name)
        if wanted != stored:
            if wanted is None or stored is None:
                code = "missing_tensor" if stored is None else "extra_tensor"
            else:
                code = "dtype" if wanted[0] != stored[0] else "shape"
            return InvalidUpdateError(
                f"{file.path}: tensor {name!r}: expected {_text(wanted)}, found {_text(stored)}; "
                "train again with the bundle of these weights",
                code=code,
            )
    return InvalidUpdateError(
        f"{file.path}: expected the tensors in the order of their names, found another; write them in that order",
        code="order",
    )


def _text(stored: _Stored | None) -> str:
    return "none" if stored is None else f"{stored[0]} {list(stored[1])}"
