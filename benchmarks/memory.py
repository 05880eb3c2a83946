"""Peak memory of several processes together, as Linux counts it, sampled while something runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from sampling import sampled

SECONDS = 0.5
PROC = Path("/proc")


def processes_below(pid: int) -> set[int]:
    """A process and all that it and those that it started have started."""
    parents: dict[int, int] = {}
    for entry in PROC.iterdir():
        if entry.name.isdecimal():
            with suppress(OSError, IndexError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(") ")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def processes_with_log(path: Path) -> set[int]:
    """The processes that print to a file."""
    found = set()
    for entry in PROC.iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                if (entry / "fd" / "1").readlink() == path:
                    found.add(int(entry.name))
    return found


def proportional_mb(pids: Iterable[int]) -> float:
    """Memory of processes, each page by the part of those that share it: of a whole tree, each page once."""
    return sum(_memory(pid).get("Pss", 0) for pid in pids) / 1000


def together_mb(pids: Iterable[int]) -> float:
    """Memory of processes of one origin: what each has alone, and the most that one of them shares with any other."""
    found = [_memory(pid) for pid in pids]
    alone, shared = (
        [sum(size for name, size in each.items() if name.startswith(kind)) for each in found]
        for kind in ("Private_", "Shared_")
    )
    return (sum(alone) + max(shared, default=0)) / 1000


def _memory(pid: int) -> dict[str, int]:
    """Kilobytes of a process by kind; none if it has ended."""
    with suppress(OSError):
        text = (PROC / str(pid) / "smaps_rollup").read_text()
        return {name: int(size) for name, size in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    return {}


@contextmanager
def peaks(measures: Mapping[str, Callable[[], float]]) -> Iterator[dict[str, float]]:
    """The largest value of some measures, sampled for as long as the context lasts."""
    found = dict.fromkeys(measures, 0.0)

    def look() -> None:
        for name, measure in measures.items():
            found[name] = max(found[name], measure())

    with sampled(look, SECONDS):
        yield found
