"""A progress bar of one line on a terminal, and nothing anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

OnStep = Callable[[int, int, float], None]
"""Function called after each step: (steps taken, total steps, mean loss of the batch)."""

REDRAW_SECONDS = 0.1
CELLS = 30


@contextmanager
def progress_bar(stream: TextIO | None = None) -> Iterator[OnStep | None]:
    """Yield a function (steps taken, total steps, loss) that redraws the bar; None where there is no terminal.

    Args:
        stream: Stream to draw on; None for stderr.
    """
    target = sys.stderr if stream is None else stream
    if not target.isatty():
        yield None
        return
    bar = _Bar(target)
    try:
        yield bar.report
    finally:
        bar.finish()


class _Bar:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._first: tuple[int, float] | None = None
        self._drawn_at = float("-inf")

    def report(self, step: int, steps: int, loss: float) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        if now - self._drawn_at < REDRAW_SECONDS and step < steps:
            return
        self._drawn_at = now
        done = CELLS * step // steps
        line = f"[{'#' * done}{'.' * (CELLS - done)}] {step}/{steps} steps, loss {loss:.4g}{self._speed(step, now)}"
        self._stream.write(f"\r\x1b[K{line}")
        self._stream.flush()

    def finish(self) -> None:
        if self._first is not None:
            self._stream.write("\n")
            self._stream.flush()

    def _speed(self, step: int, now: float) -> str:
        # Counted from the first report: a resumed call took the steps before it at another time.
        first, begun = self._first or (step, now)
        return f", {(step - first) / (now - begun):.3g} steps/s" if now > begun else ""
