"""How the change of the shared tensors is written into an update file, and read back piece by piece.

A codec is one module that registers one object in `CODECS`. The *flat change* is all shared tensors, in the order of
their names, each in C order, end to end: the codec writes it as one or more arrays, and decodes any of the pieces it
offers straight into a float32 buffer, so that an aggregation needs no memory per update.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.codecs.float32 import Float32
from fedpara_edge.errors import InvalidUpdateError
from fedpara_edge.layout import TensorSpec
from fedpara_edge.tensorfile import TensorFile


class Codec(Protocol):
    """One way of writing the change of a model into an update file."""

    name: str
    version: int

    def encode(
        self, tensors: Sequence[TensorSpec], change: Mapping[str, NDArray[np.float32]]
    ) -> dict[str, NDArray[Any]]:
        """The arrays to store, by name."""
        ...

    def check(self, file: TensorFile, tensors: Sequence[TensorSpec]) -> None:
        """Compare what is stored with what the tensors need, from the header alone.

        Raises:
            InvalidUpdateError: a name, shape or dtype differs.
        """
        ...

    def pieces(self, tensors: Sequence[TensorSpec], limit: int) -> Iterator[tuple[int, int]]:
        """Ranges (start, stop) of the flat change that decode on their own, of `limit` entries where possible."""
        ...

    def decode(self, file: TensorFile, start: int, out: NDArray[np.float32]) -> None:
        """Decode the piece of the flat change that starts at `start` into `out`."""
        ...


CODECS: dict[str, Codec] = {codec.name: codec for codec in (Float32(),)}


def codec_of(file: TensorFile) -> Codec:
    """The codec an update file names in its header.

    Raises:
        InvalidUpdateError: this release does not know it in that version.
    """
    stated = file.header.get("codec")
    for codec in CODECS.values():
        if stated == {"name": codec.name, "version": codec.version}:
            return codec
    known = ", ".join(f"{codec.name} version {codec.version}" for codec in CODECS.values())
    raise InvalidUpdateError(
        f"{file.path}: expected a codec of {known}, found {str(stated)[:80]!r}; update the server", code="unknown_codec"
    )
