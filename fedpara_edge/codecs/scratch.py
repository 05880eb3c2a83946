"""Memory that is used again for every chunk: faulting fresh pages in takes longer than the work in them.

Whoever decodes many chunks owns a `Scratch` and lends it to what it calls; without one, every array is a new one.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray


class Scratch:
    """Arrays of bytes by their use, for one thread at a time."""

    def __init__(self) -> None:
        self._arrays: dict[str, NDArray[np.uint8]] = {}

    def array(self, use: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """An array of any bytes, which is the caller's until somebody asks for one for the same use.

        Args:
            use: Name of the use.
            shape: Shape of the array.
        """
        size = math.prod(shape)
        found = self._arrays.get(use)
        if found is None or len(found) < size:
            found = self._arrays[use] = np.empty(size, np.uint8)
        return found[:size].reshape(shape)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Context in which this thread finds it with `scratch`."""
        before, _lent.scratch = _lent.scratch, self
        try:
            yield
        finally:
            _lent.scratch = before


class _Lent(threading.local):
    """The scratch that is lent to this thread."""

    scratch: Scratch | None = None


_lent = _Lent()


def scratch(use: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """An array of the scratch that is lent to this thread (`Scratch.array`), or a new one where none is."""
    return np.empty(shape, np.uint8) if _lent.scratch is None else _lent.scratch.array(use, shape)
