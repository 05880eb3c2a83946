"""The vector of some tensors on a device, each view of it as well aligned as a tensor of its own.

Between the tensors there may be entries that belong to none and stay zero. Files and device runtimes have the *packed*
vector, without them (`device_runtime.engines.vector`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpara_edge.factors.layout import TensorSpec

_ALIGNED = 32
"""Entries at a multiple of which every tensor begins: 128 bytes."""


class Places:
    """Places of some float32 tensors in vectors [P'].

    Args:
        tensors: The tensors, in the order of the vectors.
        device: Device of the vectors.
    """

    def __init__(self, tensors: Sequence[TensorSpec], device: torch.device) -> None:
        self._device = device
        self._shapes = [tensor.shape for tensor in tensors]
        self._sizes = [tensor.size for tensor in tensors]
        *self._starts, self._end = accumulate((-(-size // _ALIGNED) * _ALIGNED for size in self._sizes), initial=0)

    def zeros(self) -> Tensor:
        """Vector of zeros."""
        return torch.zeros(self._end, device=self._device)

    def views(self, vector: Tensor) -> list[Tensor]:
        """Views of the tensors in a vector, each of its shape."""
        return [piece.view(shape) for piece, shape in zip(self._pieces(vector), self._shapes, strict=True)]

    def pack(self, vector: Tensor) -> NDArray[np.float32]:
        """Packed copy [P] of a vector."""
        pieces = self._pieces(vector)
        packed: NDArray[np.float32] = torch.cat(pieces).cpu().numpy() if pieces else np.zeros(0, np.float32)
        return packed

    def fill(self, vector: Tensor, packed: NDArray[np.float32]) -> None:
        """Copy a packed vector [P] into one."""
        given = torch.from_numpy(packed).to(self._device)
        if self._sizes:
            torch._foreach_copy_(self._pieces(vector), given.split(self._sizes))  # type: ignore[no-untyped-call]

    def _pieces(self, vector: Tensor) -> list[Tensor]:
        return [vector[start : start + size] for start, size in zip(self._starts, self._sizes, strict=True)]
