"""The request to stop, for trainings in threads, to which Python delivers no signals."""

from __future__ import annotations

import threading

stopping = threading.Event()
"""Set while all trainings of this process are to take no further step."""


def stop_if_asked() -> None:
    """Return, unless trainings are to stop.

    Raises:
        KeyboardInterrupt: They are.
    """
    if stopping.is_set():
        raise KeyboardInterrupt
