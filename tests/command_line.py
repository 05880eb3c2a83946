"""What `fedpara-edge` answers in a test of a command; the fixture `run` in conftest.py calls it."""

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fedpara_edge.cli import main


class Ended(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Ended]


def succeed(folder: Path, *commands: Sequence[str]) -> None:
    """Run commands in a folder, in this process, where a fixture lives longer than `run`."""
    for command in commands:
        with pytest.MonkeyPatch.context() as patched:
            patched.chdir(folder)
            patched.setattr(sys, "argv", ["fedpara-edge", *command])
            with pytest.raises(SystemExit) as ended:
                main()
        assert not ended.value.code, command


Bad = tuple[Callable[[Path], object] | None, Sequence[str], int, str]
"""A function that prepares the working directory, arguments that are refused there, the exit code, and words of why."""


def check_refused(run: Command, here: Path, bad: Bad) -> None:
    """Bad input is one line and a code, and writes nothing."""
    prepare, arguments, code, words = bad
    if prepare is not None:
        prepare(here)
    before = _files(here)
    ended = run(*arguments)
    assert ended.code == code, ended.err
    (line,) = ended.err.splitlines()
    assert line.startswith("Error: ")
    assert re.search(words, line), line
    assert ended.out == ""
    assert _files(here) == before


def _files(folder: Path) -> list[Path]:
    """What is in a folder, without the bytecode that Python keeps of a user's module."""
    return sorted(path for path in folder.iterdir() if path.name != "__pycache__")
