"""Whatever is where a command expects a file or folder: one line, an exit code, and nothing half-written.

Besides what `fuzz.py` and `test_wholefile.py` put there, it may be cut short, of another kind, without end, of a name
that is no UTF-8, unreadable, or gone between a look at it and its opening. With the right content back, the same
command ends well.
"""

from __future__ import annotations

import functools
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from command_line import Command, Ended
from kills import TEMPORARY
from scenes import KINDS, ODD, SCENES, Scene, plainly
from written import still

from fedpara_edge.cli import fedpara_edge
from fedpara_edge.errors import EXIT_CODES

SECONDS, MIB = 20, 512
SLOW = ("simulate-more", "advise", "fold", "device", "merge-signed", "finalize-signed", "finalize-private")
"""Scenes of which only arguments themselves are replaced by everything, and what is in folders by a few kinds."""
FEW = ("a pipe", "a device", "a file without end", "a file cut short", "text")
RESTORED = ("a pipe", "a file cut short")
"""Kinds after which the right content is brought back."""


class TooSlowError(BaseException):
    """A command took more time than it may."""


_opening: list[Callable[[str], None]] = []
"""What is called with the path of each file that Python opens."""


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if _opening and event == "open" and isinstance(arguments[0], str | bytes):
        _opening[0](str(Path(os.fsdecode(arguments[0])).absolute()))


sys.addaudithook(_listen)


@contextmanager
def opening(tell: Callable[[str], None]) -> Iterator[None]:
    """Have a function told of each file before it is opened; what it raises is raised there."""
    _opening.append(tell)
    try:
        yield
    finally:
        _opening.clear()


@contextmanager
def bounded() -> Iterator[None]:
    """No more time and memory than a command may take for what it can't use."""

    def stop(*_: object) -> None:
        raise TooSlowError

    status = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    before, most = resource.getrlimit(resource.RLIMIT_DATA)
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_DATA, ((int(status["VmData"].split()[0]) << 10) + (MIB << 20), most))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (before, most))


@dataclass
class Stage:
    """A scene in a folder of its own.

    Args:
        scene: The scene.
        saved: Folder with what it finds.
        folder: Working directory, to be made.
        run: Function that runs a command.
    """

    scene: Scene
    saved: Path
    folder: Path
    run: Command

    def restore(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.saved, self.folder, symlinks=True)

    def ends(self, command: Sequence[str] = ()) -> Ended:
        """How the command ends now, once it is known to end as any command may."""
        before = self.names()
        with chdir(self.folder), self.scene.around() as known:
            words = [word.format_map(known or {}) for word in command or self.scene.command]
            with bounded():
                ended = self.run(*words)
        errors = [line for line in ended.err.splitlines() if line.startswith("Error: ")]
        assert ended.code in EXIT_CODES, ended
        assert len(errors) == (ended.code != 0), ended
        assert "Traceback" not in ended.err
        assert ended.code == 0 or ended.out == "", ended
        assert all(line.isprintable() for line in (ended.out + ended.err).splitlines()), ended
        left = self.names() - before
        assert not [name for name in left if TEMPORARY.search(f"{name}/")], ended
        begun = {name for name in left if name.split("/")[0] in self.scene.begins}
        assert ended.code in (0, self.scene.code) or left <= begun, (left, ended)
        return ended

    def names(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")}

    def ends_well(self, name: str) -> None:
        """With what belongs there back, the same command ends well."""
        path, good = self.folder / name, self.saved / name
        _remove(path)
        if good.is_dir():
            shutil.copytree(good, path)
        elif good.exists():
            shutil.copy(good, path)
        (self.folder / "own" / "member.json").unlink(missing_ok=True)  # the server is another by now
        ended = self.ends()
        assert ended.code == self.scene.code, ended


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder with what a scene finds, which is made once."""

    @functools.cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("scene") / "saved"
        folder.mkdir()
        with chdir(folder), plainly() if SCENES[name].around is plainly else still():
            SCENES[name].prepare(folder)
        return folder

    return make


@pytest.fixture
def stage(request: pytest.FixtureRequest, saved: Callable[[str], Path], tmp_path: Path, run: Command) -> Stage:
    """The stage of the scene whose name is a parameter of the test."""
    name = request.node.callspec.params["name"]
    found = Stage(scene=SCENES[name], saved=saved(name), folder=tmp_path / "here", run=run)
    found.restore()
    return found


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="limits of memory, and names of files, as Linux has"),
]
EVERY = [(name, given) for name, scene in SCENES.items() for given in scene.given]
TRIED = [
    (name, given, kind)
    for name, given in EVERY
    for kind in KINDS
    if name not in SLOW or kind in FEW or given in SCENES[name].command
]


@pytest.mark.parametrize("name", SCENES)
def test_a_scene_ends_well(name: str, stage: Stage) -> None:  # noqa: ARG001
    ended = stage.ends()
    assert ended.code == stage.scene.code, ended


@pytest.mark.parametrize(("name", "given", "kind"), TRIED)
def test_whatever_is_there_is_taken_or_refused(name: str, given: str, kind: str, stage: Stage) -> None:  # noqa: ARG001
    path = stage.folder / given
    is_output = not path.exists()
    content = path.read_bytes() if path.is_file() else b""
    _remove(path)
    KINDS[kind](path, content)
    ended = stage.ends()
    if kind not in stage.scene.given[given]:
        assert ended.code not in (0, 130), ended
    if not is_output and kind in RESTORED and ended.code not in (0, 130):
        stage.ends_well(given)


@pytest.mark.parametrize(("name", "given"), EVERY)
def test_what_can_not_be_read_is_refused(name: str, given: str, stage: Stage) -> None:  # noqa: ARG001
    place = str(stage.folder / given)
    opened = []

    def deny(path: str) -> None:
        if path == place or path.startswith(f"{place}/"):
            opened.append(path)
            raise PermissionError(13, "Permission denied", path)

    with opening(deny):
        ended = stage.ends()
    assert not opened or ended.code != 0, ended
    if (stage.saved / given).exists():
        stage.ends_well(given)


@pytest.mark.parametrize(("name", "given"), [each for each in EVERY if "." in each[1]])
def test_what_vanishes_is_as_if_it_had_not_been_there(name: str, given: str, stage: Stage) -> None:  # noqa: ARG001
    place = str(stage.folder / given)
    for number in range(1, 9):
        stage.restore()
        opened: list[str] = []

        def vanish(path: str, at: int = number, opened: list[str] = opened) -> None:
            if path == place:
                opened.append(path)
                if len(opened) == at:
                    Path(path).unlink(missing_ok=True)

        with opening(vanish):
            stage.ends()
        if len(opened) < number:
            break


@pytest.mark.parametrize(
    ("name", "given"), [(name, given) for name, given in EVERY if given in SCENES[name].command and name != "fleet"]
)
def test_any_name_is_as_good(name: str, given: str, stage: Stage) -> None:
    odd = f"{ODD}{Path(given).name}"
    for suffix in ("", ".dsse"):
        path = stage.folder / f"{given}{suffix}"
        if path.exists():
            # What is in a folder that is given too stays there.
            (shutil.copy if "/" in given else Path.rename)(path, stage.folder / f"{odd}{suffix}")
    name_of_command, *rest = stage.scene.command
    pattern = re.compile(rf"^(\w+:)?{re.escape(given)}(?=/|$)")
    words = [name_of_command, *(pattern.sub(lambda found: (found[1] or "") + odd, word) for word in rest)]
    ended = stage.ends(words)
    assert ended.code == SCENES[name].code, ended


@pytest.mark.parametrize("name", ["fleet"])
@pytest.mark.parametrize("given", ["bundle", "plan.toml", "app"])
def test_a_name_that_toml_can_not_hold_is_refused(name: str, given: str, stage: Stage) -> None:  # noqa: ARG001
    if (stage.folder / given).exists():
        (stage.folder / given).rename(stage.folder / f"{ODD}{given}")
    ended = stage.ends([f"{ODD}{given}" if word == given else word for word in stage.scene.command])
    assert (ended.code, "expected text in UTF-8" in ended.err) == (2, True)


def test_every_file_that_a_command_is_given_is_in_a_scene() -> None:
    context = click.Context(fedpara_edge)
    for name in ("simulate", "advise", "fold", "merge", "finalize", "split", "serve", "invite", "device", "push",
                 "pull"):  # fmt: skip
        command = fedpara_edge.get_command(context, name)
        assert command is not None
        words = {word for scene in SCENES.values() if scene.command[0] == name for word in scene.command}
        options = [each for each in command.params if isinstance(each, click.Option) and each.type.name == "path"]
        missing = {option.name for option in options if words.isdisjoint(option.opts)}
        assert missing <= {"transcript", "output", "test"}, (name, missing)
