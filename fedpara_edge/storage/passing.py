"""The digest of a file from what is read of it for another purpose, so that it need not be read twice.

Pieces may come in any order, from several threads, and overlap. One that comes early is kept until those before it have
come; when there is more of these than `EARLY_BYTES`, what is missing before them is read from the file. So memory is
bounded, and a file whose pieces come nearly in order is read once.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable

EARLY_BYTES = 1 << 20
"""Most bytes that are kept of a file."""
_PIECE_BYTES = 1 << 18

Read = Callable[[int, memoryview], int]
"""Function that reads from a byte of the file on into memory; the number of bytes, 0 at the end."""


class PassingDigest:
    """SHA-256 of a file whose pieces pass by.

    Args:
        read: Function that reads what did not.

    >>> content = b"0123456789"
    >>> passing = PassingDigest(lambda at, out: out.nbytes if at + out.nbytes <= 10 else 0)
    >>> for at in (4, 0):
    ...     passing.add(at, memoryview(content[at:]))
    >>> passing.finish() == hashlib.sha256(content).hexdigest()
    True
    """

    def __init__(self, read: Read) -> None:
        self._read, self._found, self._offset = read, hashlib.sha256(), 0
        self._early: dict[int, bytes] = {}
        self._adding = threading.Lock()

    def add(self, offset: int, piece: memoryview) -> None:
        """Take a piece.

        Args:
            offset: First byte of it in the file.
            piece: The bytes.
        """
        with self._adding:
            if offset > self._offset:
                if len(piece) > len(self._early.get(offset, b"")):
                    self._early[offset] = bytes(piece)
                while sum(map(len, self._early.values())) > EARLY_BYTES:
                    self._catch_up(min(self._early))
                    self._take_early()
            else:
                self._take(offset, piece)
                self._take_early()

    def catch_up(self, stop: int) -> None:
        """Read up to a byte of the file what did not pass."""
        with self._adding:
            self._catch_up(stop)

    def finish(self) -> str:
        """The hexadecimal digest, once the rest was read."""
        with self._adding:
            while self._early:
                self._catch_up(min(self._early))
                self._take_early()
            self._catch_up(None)
            return self._found.hexdigest()

    def _take(self, offset: int, piece: memoryview | bytes) -> None:
        new = memoryview(piece)[self._offset - offset :]
        self._found.update(new)
        self._offset += len(new)

    def _take_early(self) -> None:
        while self._early and min(self._early) <= self._offset:
            offset = min(self._early)
            self._take(offset, self._early.pop(offset))

    def _catch_up(self, stop: int | None) -> None:
        """Read up to a byte, or to the end of the file."""
        memory = memoryview(bytearray(_PIECE_BYTES))
        while stop is None or self._offset < stop:
            left = _PIECE_BYTES if stop is None else min(_PIECE_BYTES, stop - self._offset)
            count = self._read(self._offset, memory[:left])
            if not count:
                # Shorter than it was: whoever asks for the digest is told of that by the times of the file.
                self._offset = self._offset if stop is None else stop
                return
            self._found.update(memory[:count])
            self._offset += count
