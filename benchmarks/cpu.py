"""CPU time of all processes that one has started, as Linux counts it, at moments that pass while they run.

A process that has ended is in the time of its parent's children if the parent waited for it. One that ignores the end
of its children, as Flower's SuperExec does, has no time of theirs: of these there is what was last seen, every 50 ms.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from sampling import sampled

SECONDS = 0.05
PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class _Process:
    """A process that was seen.

    Attributes:
        own: CPU time of its own, in seconds.
        waited: CPU time of the children that it waited for, with theirs.
        is_there: Whether it was there when it was last looked for.
        children: What it started.
    """

    own: float = 0.0
    waited: float = 0.0
    is_there: bool = True
    children: list[_Process] = field(default_factory=list)

    def total(self) -> float:
        """CPU time of it and all that it started."""
        there = sum(child.total() for child in self.children if child.is_there)
        ended = sum(child.total() for child in self.children if not child.is_there)
        return self.own + there + max(self.waited, ended)


class Tree:
    """A process and all that it and those that it started start.

    Args:
        root: Number of the process.
        with_root: Whether its own CPU time counts.
    """

    def __init__(self, root: int, *, with_root: bool = True) -> None:
        self._root, self._with_root = root, with_root
        self._seen: dict[tuple[int, int], _Process] = {}
        self._first: _Process | None = None

    def sample(self) -> float:
        """CPU time so far, in seconds."""
        found = dict(_processes())
        for process in self._seen.values():
            process.is_there = False
        there: dict[int, _Process] = {}
        for pid, (_, start, own, waited) in found.items():
            if (known := self._seen.get((pid, start))) is not None:
                known.own, known.waited, known.is_there = own, waited, True
                there[pid] = known
        if self._first is None and self._root in found:
            _, start, own, waited = found[self._root]
            self._first = there[self._root] = self._seen[self._root, start] = _Process(own, waited)
        while new := [pid for pid, (parent, *_) in found.items() if pid not in there and parent in there]:
            for pid in new:
                parent, start, own, waited = found[pid]
                there[pid] = self._seen[pid, start] = _Process(own, waited)
                there[parent].children.append(there[pid])
        if self._first is None:
            return 0.0
        return self._first.total() - (0.0 if self._with_root else self._first.own)


@contextmanager
def cpu_at_each(count: Callable[[], int], tree: Tree) -> Iterator[list[float]]:
    """CPU time of processes whenever a count has grown by one, sampled for as long as the context lasts."""
    moments: list[float] = []

    def look() -> None:
        seconds = tree.sample()
        moments.extend([seconds] * (count() - len(moments)))

    with sampled(look, SECONDS):
        yield moments


def _processes() -> Iterator[tuple[int, tuple[int, int, float, float]]]:
    """Number of each process, with its parent's, its start, its CPU time and that of its children in seconds."""
    for entry in PROC.iterdir():
        if entry.name.isdecimal():
            with suppress(OSError, IndexError):
                fields = (entry / "stat").read_bytes().rpartition(b") ")[2].split()
                own, waited = (sum(map(int, fields[place : place + 2])) / _TICKS for place in (11, 13))
                yield int(entry.name), (int(fields[1]), int(fields[19]), own, waited)
