"""Mutated files of every format: each reads as something consistent, or is refused by a `FedparaError` of one line.

    python tests/fuzz.py [--count N] [--first N] [--keep FOLDER] [FORMAT...]

No other exception, no end of the process, no more than `SECONDS` of CPU time and `MIB` of memory. The mutant of a
number is always the same: `--first 17 --count 1` repeats one, and `--keep FOLDER` keeps the first of each fault. What
is in the place of a file but is none, or has no end (`STAND_INS`), comes before the mutants.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, contextmanager
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import IO

import click
from fuzzed import ALLOWED, FORMATS, Format, Made
from written import still

from fedpara_edge.errors import FedparaError

SECONDS = 2.0
MIB = 256
AT_ONCE = 1000
"""Mutants for each process."""
STAND_INS: Mapping[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a huge file": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
}
"""What is put in the place of a file, by name."""


class TooSlowError(BaseException):
    """A mutant took more time than it may."""


def fault_of(made: Made, content: bytes, path: Path) -> str:
    """What is wrong with how a mutant is read, and where; "" for nothing."""
    path.write_bytes(content)
    return fault_in(made, path, signal.ITIMER_PROF)


def fault_in(made: Made, path: Path, timer: int) -> str:
    """What is wrong with how what is at a path is read, in the time of a timer."""
    try:
        with limited(timer):
            made[1](path)
    except FedparaError as error:
        return "" if "\n" not in str(error) else f"several lines: {str(error)!r}"
    except ALLOWED:
        return ""
    except BaseException as error:  # noqa: BLE001 - that is what is looked for
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:120]!r} at {Path(place.filename).name}:{place.lineno}"
    return ""


@contextmanager
def limited(timer: int) -> Iterator[None]:
    """Raise `TooSlowError` after too much time of the CPU (`ITIMER_PROF`), or five times that (`ITIMER_REAL`)."""

    def stop(*_: object) -> None:
        raise TooSlowError

    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, stop)
    signal.setitimer(timer, SECONDS if timer == signal.ITIMER_PROF else 5 * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(timer, 0)


def mutant(format: Format, name: str, number: int, contents: list[bytes]) -> tuple[int, bytes]:
    """Number of the file that is mutated, and its content then."""
    random = Random(f"{name} {number}")
    which = random.randrange(len(contents))
    return which, format.mutate(contents[which], random)


def faults(name: str, numbers: range) -> Iterator[tuple[int, str]]:
    """Numbers of mutants that something is wrong with, and what."""
    format = FORMATS[name]
    with TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place, still():
        with chdir(place):
            made = format.make(Path(place))
        contents = [path.read_bytes() for path in made[0]]
        for path in made[0]:
            made[1](path)  # what was not mutated is read
        if not format.message:
            yield from _in_child(name, range(-len(STAND_INS) * len(contents), 0), made, contents)
        for first in range(numbers.start, numbers.stop, AT_ONCE):
            yield from _in_child(name, range(first, min(first + AT_ONCE, numbers.stop)), made, contents)


def _in_child(name: str, numbers: range, made: Made, contents: list[bytes]) -> Iterator[tuple[int, str]]:
    """The same in a child, whose end is a fault of the mutant that it was at."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            with os.fdopen(writing, "w") as told:
                _read_all(name, numbers, made, contents, told)
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    number = numbers.start
    with os.fdopen(reading) as heard:
        for line in heard:
            if line.startswith('"'):
                yield number, json.loads(line)
            else:
                number = int(line)
    _, status = os.waitpid(child, 0)
    if status:
        yield number, f"the process ended with status {status}"
        yield from _in_child(name, range(number + 1, numbers.stop), made, contents)


def _read_all(name: str, numbers: range, made: Made, contents: list[bytes], told: IO[str]) -> None:
    """Read mutants, and tell the number of each before and what is wrong after; those below 0 are stand-ins."""
    _limit_memory()
    for number in numbers:
        print(number, file=told, flush=True)
        if number < 0:
            which, kind = divmod(-1 - number, len(STAND_INS))
            fault = _fault_of_stand_in(made, made[0][which], [*STAND_INS][kind])
        else:
            which, content = mutant(FORMATS[name], name, number, contents)
            fault = fault_of(made, content, made[0][which])
        made[0][which].write_bytes(contents[which])
        if fault:
            print(json.dumps(fault), file=told, flush=True)


def _fault_of_stand_in(made: Made, path: Path, kind: str) -> str:
    """What is wrong with how something else in the place of a file is read."""
    path.unlink(missing_ok=True)  # some readers remove what they have done with
    STAND_INS[kind](path)
    fault = fault_in(made, path, signal.ITIMER_REAL)
    path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    return f"{kind}: {fault}" if fault else ""


def _limit_memory() -> None:
    status = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    used = int(status["VmData"].split()[0]) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (used + (MIB << 20), used + (MIB << 20)))


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(FORMATS)), metavar="[FORMAT]...")
@click.option("--count", type=click.IntRange(1), default=100_000, show_default=True, help="Mutants of each format.")
@click.option("--first", type=click.IntRange(0), default=0, show_default=True, help="Number of the first.")
@click.option("--keep", type=click.Path(path_type=Path), help="Folder to write the first mutant of each fault to.")
@click.option("--even", is_flag=True, help="Fewer mutants of formats that take longer to read.")
def main(names: tuple[str, ...], count: int, first: int, keep: Path | None, even: bool) -> None:
    """Read mutants, and end with 1 if anything is wrong with how."""
    wrong = 0
    for name in names or FORMATS:
        started = time.process_time(), os.times()
        many = max(1, count // FORMATS[name].slow) if even else count
        found: Counter[str] = Counter()
        for number, fault in faults(name, range(first, first + many)):
            place = fault.rpartition(" at ")[2]
            if not found[place]:
                click.echo(f"{name}: mutant {number}: {fault}", err=True)
                if keep is not None:
                    _keep(name, number, keep)
            found[place] += 1
        wrong += found.total()
        seconds = os.times().children_user - started[1].children_user + time.process_time() - started[0]
        click.echo(
            f"{name}: {many} mutants, {found.total()} faults of {len(found)} kinds in {seconds:.0f} s of CPU time"
        )
    sys.exit(wrong > 0)


def _keep(name: str, number: int, folder: Path) -> None:
    format = FORMATS[name]
    with TemporaryDirectory() as place, still(), chdir(place):
        contents = [path.read_bytes() for path in format.make(Path(place))[0]]
    folder.mkdir(exist_ok=True)
    (folder / f"{name.replace(' ', '-')}-{number}").write_bytes(mutant(format, name, number, contents)[1])


if __name__ == "__main__":
    main()
