"""What happens on a server, as it is told to whoever keeps a log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

OnEvent = Callable[..., None]
"""Function of an event: its name, `level` of Python's logging, and fields."""


def ignore(name: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Pass over an event."""
