"""Codec `drawn` of the weights of round 0: random tensors that are drawn again from a seed instead of stored.

What a model begins with is random, apart from few tensors: any numbers of the same size do as well. So of each tensor
with at least two dimensions, nothing but its root mean square is stored. Header field `codec`:

    name, version   "drawn", 1
    seed            number of which all are drawn
    widths          {name: width w}, of each tensor that is drawn

and every other tensor as float32, under its own name and shape. Entry i of a tensor that is drawn is
w (2 x - 65535) / 65536, rounded to float32 once, so that its mean is about 0 and its root mean square w / √3. The
numbers x are those of 2 bytes each, the lower one first, of `factors.splitmix`, from the seed whose 8 bytes, lowest
first, begin the SHA-256 of the UTF-8 text "fedpara-edge/drawn <seed> <name>".

Only weights have this codec: the weights are what is drawn, for everybody alike. They are not what the model began with
before.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.codecs.codec import Decoder, Encoded, flatten, unflatten
from fedpara_edge.errors import InvalidUpdateError, brief
from fedpara_edge.factors.layout import TensorSpec
from fedpara_edge.factors.splitmix import random_bytes
from fedpara_edge.storage.tensorfile import TensorFile

NAME, VERSION = "drawn", 1
MAX_ENTRIES = 1 << 25
"""Most entries to draw for a file, however small it is, of a bundle that is not known."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Encoder of initial weights.

    Args:
        seed: Seed of all that is drawn.
        name: Codec name stored in file headers.
        version: Codec version stored in file headers.
    """

    seed: int
    name: str = NAME
    version: int = VERSION
    unbiased: ClassVar[bool] = False

    def encode(self, tensors: Sequence[TensorSpec], change: NDArray[np.float32], *, seed: int | None) -> Encoded:  # noqa: ARG002
        """Encode initial weights; what is decoded has their root mean squares and nothing else of those drawn."""
        values = unflatten(tensors, change)
        widths = {
            tensor.name: float(
                np.float32(math.sqrt(3 * float(np.square(values[tensor.name], dtype=np.float64).mean())))
            )
            for tensor in tensors
            if is_drawn(tensor)
        }
        arrays = {tensor.name: values[tensor.name] for tensor in tensors if tensor.name not in widths}
        decoded = {**arrays, **{t.name: draw(t, self.seed, widths[t.name]) for t in tensors if t.name in widths}}
        return Encoded(arrays=arrays, decoded=flatten(tensors, decoded), settings={"seed": self.seed, "widths": widths})


def is_drawn(tensor: TensorSpec) -> bool:
    """Whether a tensor is drawn: one with two dimensions or more."""
    return sum(size > 1 for size in tensor.shape) >= 2


def draw(tensor: TensorSpec, seed: int, width: float) -> NDArray[np.float32]:
    """Values of a tensor, float32 in its shape."""
    digest = hashlib.sha256(f"fedpara-edge/drawn {seed} {tensor.name}".encode()).digest()
    words = -(-tensor.size // 4)
    numbers = random_bytes(int.from_bytes(digest[:8], "little"), 0, words).view("<u2")[: tensor.size]
    fractions: NDArray[Any] = (2 * numbers.astype(np.float32) - 65535) / 65536
    return (np.float32(width) * fractions).reshape(tensor.shape)


def open_drawn(file: TensorFile, tensors: Sequence[TensorSpec], settings: Mapping[str, Any]) -> Decoder:
    """Open weights of this codec (`codecs.codec.Opener`).

    Raises:
        InvalidUpdateError: A setting, or a tensor that is stored, does not fit.
    """
    seed: Any = settings.get("seed")
    widths: Any = settings.get("widths")
    wanted = {tensor.name for tensor in tensors if is_drawn(tensor)}
    fits = settings.keys() == {"seed", "widths"} and type(seed) is int and isinstance(widths, dict)
    if not fits or widths.keys() != wanted or not all(type(w) is float and 0 <= w < math.inf for w in widths.values()):
        raise InvalidUpdateError(
            f"{file.path}: expected a seed and the widths of the tensors that are drawn, found {brief(settings)}; "
            "copy it again",
            code="payload",
        )
    stored = {tensor.name: tensor for tensor in tensors if tensor.name not in wanted}
    for name in stored.keys() | (file.entries.keys() - {"statistics"}):
        entry = file.entries.get(name)
        if name not in stored or entry is None or (entry.dtype, entry.shape) != ("float32", stored[name].shape):
            raise InvalidUpdateError(
                f"{file.path}: tensor {brief(name)}: expected float32 "
                f"{list(stored[name].shape) if name in stored else 'of no such name'}, found "
                f"{'none' if entry is None else f'{entry.dtype} {list(entry.shape)}'}; copy it again",
                code="shape",
            )
    values = {name: file.read(name) for name in stored}
    drawn = {tensor.name: draw(tensor, seed, widths[tensor.name]) for tensor in tensors if is_drawn(tensor)}
    return _Whole(flatten(tensors, {**values, **drawn}))


@dataclass(frozen=True)
class _Whole:
    """Decoder of what is decoded already."""

    values: NDArray[np.float32]

    def decode(self, start: int, out: NDArray[np.float32]) -> None:
        """Copy a chunk."""
        out[...] = self.values[start : start + len(out)]
