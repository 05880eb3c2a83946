"""Something that is looked at again and again while something else runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def sampled(look: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call a function every so many seconds for as long as the context lasts, and once at its end."""
    done = threading.Event()

    def keep_looking() -> None:
        is_done = False
        while not is_done:
            is_done = done.wait(seconds)
            look()

    thread = threading.Thread(target=keep_looking, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
