"""The codec `float32`, version 1: the change as it is.

Stored: one float32 tensor for every shared tensor, under its own name and shape. As all have one dtype, safetensors
lays them end to end by name: without running statistics, the file is the flat change in little-endian float32 from its
first tensor on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.codecs import codec
from fedpara_edge.codecs.codec import Encoded, chunks, spelled_range, unflatten
from fedpara_edge.codecs.settings import read_settings
from fedpara_edge.codecs.sums import Sums, damaged, read_sums, sum_of
from fedpara_edge.errors import InvalidUpdateError
from fedpara_edge.factors.layout import TensorSpec
from fedpara_edge.storage.tensorfile import TensorFile


@dataclass(frozen=True)
class Float32:
    """Lossless encoder with 4 bytes per entry."""

    name: ClassVar[str] = "float32"
    version: ClassVar[int] = 1
    unbiased: ClassVar[bool] = True

    def encode(self, tensors: Sequence[TensorSpec], change: NDArray[np.float32], *, seed: int | None) -> Encoded:  # noqa: ARG002
        """Store the change itself, tensor by tensor."""
        sums = [sum_of(change[start:stop]) for start, stop in chunks(len(change))]
        return Encoded(arrays=unflatten(tensors, change), decoded=change, sums=sums)


@dataclass(frozen=True)
class Float32Decoder:
    """Decoder that reads ranges of the file."""

    file: TensorFile
    runs: Sequence[tuple[int, int, int]]
    """Parts of the flat change that are end to end in the file: first entry, the one after the last, and offset."""
    tensors: Sequence[TensorSpec]
    """Shared tensors, in the order of the flat change."""
    sums: Sums | None = None
    """Sums of the chunks; None where the file states none."""

    def decode(self, start: int, out: NDArray[np.float32]) -> None:
        """Read the chunk straight into `out`."""
        for first, stop, offset in self.runs:
            begin, end = max(first, start), min(stop, start + len(out))
            if begin < end:
                self.file.read_into(offset + 4 * (begin - first), out[begin - start : end - start])
        if self.sums is not None and self.sums[start // codec.CHUNK_ENTRIES] != sum_of(out):
            raise damaged(self.file, spelled_range(self.tensors, start, start + len(out)))


def open_float32(file: TensorFile, tensors: Sequence[TensorSpec], settings: Mapping[str, Any]) -> Float32Decoder:
    """Decoder of a file with every shared tensor as float32 in its own shape, by name, and nothing else.

    Raises:
        InvalidUpdateError: A tensor differs, the first of which is named, or there are settings.
    """
    read_settings(file, "float32", settings)
    expected = [(tensor.name, ("float32", tensor.shape)) for tensor in sorted(tensors, key=lambda tensor: tensor.name)]
    found = [(name, (entry.dtype, entry.shape)) for name, entry in file.entries.items()]
    if expected != found:
        raise _difference(file, dict(expected), dict(found))
    count = len(list(chunks(sum(tensor.size for tensor in tensors))))
    return Float32Decoder(file, _runs(file, tensors), tensors, read_sums(file, count))


def _runs(file: TensorFile, tensors: Sequence[TensorSpec]) -> list[tuple[int, int, int]]:
    runs: list[tuple[int, int, int]] = []
    position = 0
    for tensor in tensors:
        offset = file.entries[tensor.name].offset
        if runs and offset == runs[-1][2] + 4 * (position - runs[-1][0]):
            runs[-1] = runs[-1][0], position + tensor.size, runs[-1][2]
        else:
            runs.append((position, position + tensor.size, offset))
        position += tensor.size
    return runs


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
                "write it again with the bundle that it names",
                code=code,
            )
    return InvalidUpdateError(
        f"{file.path}: expected the tensors in the order of their names, found another; write them in that order",
        code="order",
    )


def _text(stored: _Stored | None) -> str:
    return "none" if stored is None else f"{stored[0]} {list(stored[1])}"
