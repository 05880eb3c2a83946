"""Bytes that arrive from another machine: no more than expected, and no slower than a slow line brings them.

The timeout of a socket ends a wait for the next byte. A server that sends one just before that, again and again, would
keep who asked it waiting for good.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from fedpara_edge.errors import FedparaError

GRACE_SECONDS = 60.0
"""Time in which bytes may arrive as slowly as they do."""
LEAST_RATE = 1000.0
"""Bytes a second, on average, below which an answer is given up then."""


class TooMuchError(FedparaError):
    """More arrives than was expected: exit code 1."""

    code = "too_much"


class TooSlowError(FedparaError):
    """What arrives takes too long: exit code 1."""

    code = "too_slow"


def arriving(pieces: Iterable[bytes], *, name: str, max_bytes: int, remedy: str) -> Iterator[bytes]:
    """The pieces of something as they arrive, until they are too many or too slow.

    Args:
        pieces: Pieces.
        name: Name of what arrives, in errors.
        max_bytes: Largest size of all together.
        remedy: Remedy for too many bytes.

    Raises:
        TooMuchError: There are more bytes, before any of the piece is given that has them.
        TooSlowError: They arrive too slowly.

    >>> list(arriving([b"ab", b"c"], name="x", max_bytes=3, remedy="none"))
    [b'ab', b'c']
    """
    received, started = 0, time.monotonic()
    for piece in pieces:
        received += len(piece)
        if received > max_bytes:
            raise TooMuchError(f"{name}: expected at most {max_bytes} bytes, found more; {remedy}")
        seconds = time.monotonic() - started
        if seconds > GRACE_SECONDS and received < seconds * LEAST_RATE:
            raise TooSlowError(
                f"{name}: expected at least {LEAST_RATE:.0f} bytes a second, found {received} in {seconds:.0f} s; try "
                "again, or over another line"
            )
        yield piece
