"""The bytes of one encoded chunk, taken piece by piece from the front, and the error for bytes that make no sense."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class DamageError(Exception):
    """Stored bytes that cannot be decoded.

    Args:
        message: Expectation and finding.
        block: Number of the block in its chunk, if only one is affected.
    """

    def __init__(self, message: str, *, block: int | None = None) -> None:
        super().__init__(message)
        self.block = block


class Section:
    """Cursor over bytes, uint8 [n]; whatever is taken is a view of them.

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

    def peek(self, max_bytes: int) -> NDArray[np.uint8]:
        """Next bytes, left in place: `max_bytes` of them, or all that are left."""
        return self._stored[self._position : self._position + max_bytes]

    def take(self, count: int, what: str) -> NDArray[np.uint8]:
        """Take the next `count` bytes.

        Raises:
            DamageError: Fewer are left; the message calls them `what`.
        """
        start, end = self._position, self._position + count
        if end > len(self._stored):
            raise DamageError(f"{count} bytes of {what}, found {self.rest}")
        self._position = end
        return self._stored[start:end]

    def byte(self, what: str) -> int:
        """Take the next byte.

        Raises:
            DamageError: None is left; the message calls it `what`.
        """
        return int(self.take(1, what)[0])

    def finish(self) -> None:
        """Check that all bytes were taken.

        Raises:
            DamageError: Some are left.
        """
        if self.rest:
            raise DamageError(f"the end of its bytes, found {self.rest} more")
