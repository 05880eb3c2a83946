"""The bytes of one encoded chunk, taken from its front piece by piece, and the error of bytes that make no sense."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class DamageError(Exception):
    """What is stored cannot be decoded.

    Args:
        message: what was expected, and what was found.
        block: number of the block in its chunk, if only one is concerned.
    """

    def __init__(self, message: str, *, block: int | None = None) -> None:
        super().__init__(message)
        self.block = block


class Section:
    """A cursor over bytes, uint8 [n]; whatever is taken is a view of them.

    >>> section = Section(np.arange(4, dtype=np.uint8))
    >>> section.take(3, "numbers"), section.rest
    (array([0, 1, 2], dtype=uint8), 1)
    """

    def __init__(self, stored: NDArray[np.uint8]) -> None:
        self._stored = stored
        self._position = 0

    @property
    def rest(self) -> int:
        """Number of bytes not yet taken."""
        return len(self._stored) - self._position

    def peek(self, most: int) -> NDArray[np.uint8]:
        """The next bytes, `most` of them or all that are left."""
        return self._stored[self._position : self._position + most]

    def take(self, count: int, what: str) -> NDArray[np.uint8]:
        """The next `count` bytes.

        Raises:
            DamageError: there are fewer; `what` names them.
        """
        start, end = self._position, self._position + count
        if end > len(self._stored):
            raise DamageError(f"{count} bytes of {what}, found {self.rest}")
        self._position = end
        return self._stored[start:end]

    def byte(self, what: str) -> int:
        """The next byte.

        Raises:
            DamageError: there is none.
        """
        return int(self.take(1, what)[0])

    def finish(self) -> None:
        """See to it that nothing is left.

        Raises:
            DamageError: there is.
        """
        if self.rest:
            raise DamageError(f"the end of its bytes, found {self.rest} more")
