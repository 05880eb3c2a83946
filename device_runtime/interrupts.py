"""Ctrl-C and SIGTERM, held back until it is safe to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def holding_interrupts() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether SIGINT or SIGTERM came; only a second one raises KeyboardInterrupt at once.

    Outside the main thread, where Python delivers no signals, nothing changes and the function returns False.

    >>> with holding_interrupts() as interrupted:
    ...     signal.raise_signal(signal.SIGINT)
    ...     interrupted()
    True
    """
    came = False

    def hold(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.getsignal(number) for number in numbers]
    for number in numbers:
        signal.signal(number, hold)
    try:
        yield lambda: came
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            # None: the handler was not set from Python and can't be restored from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
