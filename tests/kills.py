"""Every command that writes: killed in every call by which it changes a file, and on disks that fail from there on.

    python tests/kills.py [--fault NAME]... [--sample N] [CASE...]

After each the outputs are whole or as before, none without those that belong with it, and the same command again ends
as it would have undisturbed, with the same bytes in every file and no other file. `--sample N` takes N calls of each
command only.
"""

from __future__ import annotations

import errno
import re
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import chdir
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from zlib import crc32

import click
from disk_calls import KILL, SYNCS, Call, Ended, Fault, run_watched
from written import CASES, Case, exit_code, run_here, still

FAULTS = {
    "killed": (KILL, False),
    "full": (errno.ENOSPC, True),
    "read-only": (errno.EROFS, True),
    "failing once": (errno.EIO, False),
}
TEMPORARY = re.compile(r"(^|/)\.[^/]+\.[a-z0-9_]{8}/")
"""Folder in which what is not complete yet has its name."""
NAMED_AT_RANDOM = re.compile(r"\.[a-z0-9_]{8}(?=/|$)")
"""What is in the name of something temporary, and matters to nobody."""
FAILURES = (1, 2)
"""Exit codes of a command that can't write: failure, or an output that can't be written."""
Files = Mapping[str, bytes | None]
"""Content by path; None for a folder."""
State = frozenset[tuple[str, bytes | None, int]]
"""Path, content and mode of all that is in a folder."""


def files_in(folder: Path) -> Files:
    """All that is below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def state_of(folder: Path, files: Files) -> State:
    """What decides how a command ends that is run in a folder."""
    return frozenset(
        (NAMED_AT_RANDOM.sub(".random", path), content, (folder / path).lstat().st_mode)
        for path, content in files.items()
    )


def part(files: Files, output: str) -> Files:
    """An output, with what is in it if it is a folder."""
    return {path: content for path, content in files.items() if path == output or path.startswith(f"{output}/")}


def check_synced(calls: Sequence[Call], *, but: str) -> None:
    """Everything is written to the disk before it appears under its name, or the name may come before the content."""
    dirty: set[str] = set()
    for call in calls:
        if call.path.startswith(f"{but}/"):
            continue
        if call.name in SYNCS:
            dirty.discard(call.path)
        elif call.source:
            below = {path for path in dirty if path == call.source or path.startswith(f"{call.source}/")}
            assert not below or TEMPORARY.search(call.path), f"{call.path} appears before {below} is synced"
            dirty = (dirty - below) | {call.path + path.removeprefix(call.source) for path in below}
        elif "write" in call.name or "sendfile" in call.name or call.name == "copy_file_range":
            dirty.add(call.path)


class Trial:
    """A command in a folder that is brought back to what was before for each fault.

    How the same command ends after a fault is found out once for each state that faults leave.

    Args:
        case: Command, and what it finds.
        place: Empty folder.
    """

    def __init__(self, case: Case, place: Path) -> None:
        self._case, self._saved, self._folder = case, place / "saved", place / "here"
        self._ends: dict[State, tuple[int | None, Files, str]] = {}
        self._saved.mkdir()
        with chdir(self._saved):
            case.prepare(self._saved)
        self._restore()
        run_here(self._folder, *case.command)  # so that the children need not import anything
        self._restore()
        self.first = self._run()
        assert self.first.code == 0, self.first.err
        self._before, self._after = files_in(self._saved), files_in(self._folder)
        self._second = self._run()
        self._after_second = files_in(self._folder)
        check_synced(self.first.calls, but=case.verified)

    def check(self, fault: Fault) -> None:
        """Hold the laws for one fault."""
        self._restore()
        hurt = self._run(fault)
        if fault.error == KILL:
            assert hurt.code is None, hurt
        else:
            self._check_failure(hurt)
        found = files_in(self._folder)
        done = []
        for output in self._case.outputs:
            before, whole = part(self._before, output), part(self._after, output)
            assert part(found, output) in (before, whole), output
            done += [part(found, output) == whole] if before != whole else []
        assert done == sorted(done, reverse=True), "in another order"
        assert hurt.code != 0 or all(done), "not done"
        left = state_of(self._folder, found)
        if left not in self._ends:
            again = self._run()
            self._ends[left] = again.code, files_in(self._folder), again.err
        *ended, err = self._ends[left]
        expected = ([0, self._after], [self._second.code, self._after_second])
        assert ended in expected, f"{err}\n{_difference(ended[1], self._after)}"

    def _check_failure(self, hurt: Ended) -> None:
        if hurt.code == 0:  # what failed was only to tidy up
            return
        assert hurt.code in FAILURES, hurt
        errors = [line for line in hurt.err.splitlines() if not line.startswith(("note: ", "warning: "))]
        assert len(errors) == 1, hurt.err
        assert errors[0].startswith("Error: "), hurt.err

    def _run(self, fault: Fault | None = None) -> Ended:
        return run_watched(partial(exit_code, self._case.command), self._folder, fault)

    def _restore(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        shutil.copytree(self._saved, self._folder)


def _difference(found: Files, expected: Files) -> str:
    return ", ".join(sorted(path for path in found | expected if found.get(path, 0) != expected.get(path, 0)))


def places(calls: int, sample: int | None, seed: str) -> Iterable[int]:
    """Numbers of the calls to try: all, or some at equal distances, the first of them by a seed."""
    if sample is None or sample >= calls:
        return range(calls)
    first = crc32(seed.encode()) % calls
    return ((first + calls * number // sample) % calls for number in range(sample))


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(CASES)))
@click.option("--fault", "kinds", multiple=True, type=click.Choice(list(FAULTS)), help="Fault to try.  [default: all]")
@click.option("--sample", type=click.IntRange(1), help="Number of calls to try of each command.  [default: all]")
def main(names: tuple[str, ...], kinds: tuple[str, ...], sample: int | None) -> None:
    """Try faults, and end with 1 if anything was other than it should be."""
    failed = 0
    for name in names or CASES:
        started, tried = time.perf_counter(), 0
        with TemporaryDirectory() as place, still():
            trial = Trial(CASES[name], Path(place))
            calls = trial.first.calls
            for kind in kinds or FAULTS:
                error, lasts = FAULTS[kind]
                for at in places(len(calls), sample, f"{kind} {name}"):
                    tried += 1
                    try:
                        trial.check(Fault(at, error, lasts))
                    except AssertionError as wrong:
                        failed += 1
                        click.echo(f"{name}: {kind} at call {at}, {calls[at].name} {calls[at].path}: {wrong}", err=True)
        seconds = time.perf_counter() - started
        click.echo(f"{name}: {len(calls)} calls, {tried} faults tried in {seconds:.0f} s")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
