"""The vector of all trained tensors: each flattened in C order, end to end in the order of the layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.errors import InputError
from fedpara_edge.factors.layout import TensorSpec

Vector = NDArray[np.float32]


def zeros(tensors: Sequence[TensorSpec]) -> Vector:
    """Vector [P] of zeros for some tensors."""
    return np.zeros(sum(tensor.size for tensor in tensors), np.float32)


def views(vector: Vector, tensors: Sequence[TensorSpec]) -> dict[str, NDArray[np.float32]]:
    """Tensors by name, each with its shape, as views of a vector.

    >>> spec = TensorSpec(name="w", shape=(2, 2), dtype="float32", layer="fc", part="weight", role="shared")
    >>> vector = zeros([spec])
    >>> views(vector, [spec])["w"][1, 0] = 5
    >>> vector.tolist()
    [0.0, 0.0, 5.0, 0.0]
    """
    found: dict[str, NDArray[np.float32]] = {}
    start = 0
    for tensor in tensors:
        found[tensor.name] = vector[start : start + tensor.size].reshape(tensor.shape)
        start += tensor.size
    return found


def assign(places: Mapping[str, NDArray[np.float32]], values: Mapping[str, NDArray[Any]]) -> None:
    """Copy values into the arrays of the same names; the other arrays stay as they are.

    Raises:
        InputError: There is no array of a name, or it has another shape.
    """
    for name, value in values.items():
        if name not in places or places[name].shape != value.shape:
            expected = f"shape {places[name].shape}" if name in places else "the name of a trained tensor"
            raise InputError(
                f"tensor {name!r}: expected {expected}, found shape {value.shape}; use tensors of this bundle"
            )
        places[name][...] = value


def pieces(vector: Vector, like: Sequence[Vector]) -> list[Vector]:
    """Cut a vector into consecutive views, as long as the pieces of `like`.

    >>> [piece.tolist() for piece in pieces(np.arange(3, dtype=np.float32), [zeros([]), *np.zeros((2, 1), np.float32)])]
    [[], [0.0], [1.0]]
    """
    ends = accumulate(map(len, like))
    return [vector[end - len(piece) : end] for end, piece in zip(ends, like, strict=True)]
