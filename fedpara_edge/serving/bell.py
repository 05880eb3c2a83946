"""A bell, for which coroutines wait until there is something new to look at."""

from __future__ import annotations

import asyncio
from contextlib import suppress


class Bell:
    """A bell that rings for all who wait, again and again.

    Attributes:
        next: Event that the next ring sets. Who waits for it takes it before the look at what may change, so that
            nothing is missed in between.
    """

    def __init__(self) -> None:
        self.next = asyncio.Event()

    def ring(self) -> None:
        """Wake all who wait; in the thread of the event loop."""
        self.next.set()
        self.next = asyncio.Event()


async def wait_for(event: asyncio.Event, seconds: float) -> None:
    """Wait for an event, or for some time."""
    with suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)
