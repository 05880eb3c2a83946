"""Patience with a server that can't be reached: waits that double from one second to five minutes.

Each is drawn at random below its bound, so that devices that lost their server together don't come back all at once.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from device_runtime.agent.connection import UnreachableError

Result = TypeVar("Result")
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 300.0


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long to try again.

    Args:
        seconds: Time without an answer after which to give up; None for never.
        tell: Function of an event, its name and fields, that is told of each wait.
        sleep: Function that waits for a number of seconds.
    """

    seconds: float | None
    tell: Callable[..., None]
    sleep: Callable[[float], None] = time.sleep

    def __call__(self, attempt: Callable[[], Result]) -> Result:
        """The result of something that needs the server, tried until there is one.

        Raises:
            UnreachableError: There was no answer for too long.
        """
        bound, begun = FIRST_WAIT_SECONDS, time.monotonic()
        while True:
            try:
                return attempt()
            except UnreachableError as error:
                drawn = random.uniform(FIRST_WAIT_SECONDS / 2, bound)
                wait = drawn if error.after_seconds is None else error.after_seconds + random.random()
                bound = min(2 * bound, LONGEST_WAIT_SECONDS)
                if self.seconds is not None and time.monotonic() + wait - begun > self.seconds:
                    raise
                self.tell("unreachable", message=str(error), again_in_seconds=round(wait, 1))
                self.sleep(wait)
