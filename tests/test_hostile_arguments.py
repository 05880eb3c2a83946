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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, chdir, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from socketserver import BaseServer
from typing import Any

import click
import numpy as np
import pytest
import signed
from command_line import Command, Ended
from hub_server import TOKEN, serving_hub
from kills import TEMPORARY
from served import bundle_in, federation_in, serving
from small_net import CLASSES, SHAPE, export_small_net
from small_round import send, start_round
from softmax_regression import SoftmaxRegression, make_bundle, write_npz
from written import CASES, half_run, plan_with_two_clients, run_here, signed_round, still

from device_runtime.agent import agent
from device_runtime.state import COMMITTED
from fedpara_edge.cli import fedpara_edge, serve
from fedpara_edge.errors import EXIT_CODES
from fedpara_edge.formats.bundle import write_manifest
from fedpara_edge.serving.certificates import AUTHORITY, CERTIFICATE, KEY, make_certificates
from fedpara_edge.serving.invitation import keep_address
from fedpara_edge.serving.tokens import open_tokens
from fedpara_edge.trust.keys import new_key

SECONDS, MIB = 20, 512
TEXT = "\x1b[2J\u202e not what it should be\n" * 40
ODD = os.fsdecode(b"\xff\x1b[2J-")
"""Beginning of a name that is no UTF-8 and would clear a terminal."""
NOISE = "gaussian:clip=0.5,noise=2,expected=2,epsilon=9,delta=1e-5"
Make = Callable[[Path, bytes], object]
"""Function that puts something at a path, given the content of the file that was there."""
Around = Callable[[], AbstractContextManager[Mapping[str, str] | None]]


def _without_end(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    os.truncate(path, 1 << 40)


KINDS: Mapping[str, Make] = {
    "nothing": lambda *_: None,
    "a pipe": lambda path, _: os.mkfifo(path),
    "an empty folder": lambda path, _: path.mkdir(),
    "a device": lambda path, _: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path, _: path.symlink_to(path.name),
    "a link to nowhere": lambda path, _: path.symlink_to("nowhere"),
    "an empty file": lambda path, _: path.touch(),
    "a file without end": _without_end,
    "a file cut short": lambda path, content: path.write_bytes(content[: len(content) // 2]),
    "text": lambda path, _: path.write_text(TEXT),
    "nested text": lambda path, _: path.write_text("[" * 100_000),
    "bytes": lambda path, _: path.write_bytes(bytes(range(256)) * 64),
    "an archive": lambda path, _: path.write_bytes(b"PK\3\4" + bytes(60)),
}
LINKS = ("a link to itself", "a link to nowhere")
FREE = ("nothing", *LINKS)
"""What may be in the place of an output."""
NEW = (*FREE, "an empty folder")
"""What may be in the place of a folder that is made if it is missing."""
JOURNAL = (*FREE, "an empty file", "a file cut short", "nested text", "an archive")
"""What may be in the place of a journal, of which half a line at the end is cut off."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A command that ends well, and what it is given.

    Args:
        prepare: Function that makes the files that the command finds in the working directory, which it is given too.
        command: Arguments of `fedpara-edge`; what is in braces is known when it runs.
        given: Files and folders that it is given, and files in these folders; each with the kinds that are good too.
        begins: Folders that it makes or locks before it reads anything else.
        around: Context in which it runs, with what the braces stand for.
        code: Exit code.
    """

    prepare: Callable[[Path], object]
    command: Sequence[str]
    given: Mapping[str, Sequence[str]]
    begins: Sequence[str] = ()
    around: Around = still
    code: int = 0


def each(*names: str, good: Sequence[str] = ()) -> dict[str, Sequence[str]]:
    return dict.fromkeys(names, good)


BUNDLE = each("bundle", "bundle/manifest.json", "bundle/weights.safetensors", "bundle/local.safetensors")


def _searched(folder: Path) -> None:
    """A search that was cut short before its first round."""
    plan_with_two_clients(folder)
    (folder / "search").mkdir()
    shutil.copy(folder / "plan.toml", folder / "search" / "search.toml")


def _signed_partials(folder: Path) -> None:
    signed_round(folder)
    with (folder / "clients.toml").open("a") as file:
        file.write(f'\n[aggregators.east]\nkey = "{new_key(folder / "east")}"\n')
    for client in ("ann", "ben"):
        run_here(folder, "aggregate", "--partial", f"{client}.update", "--weights", "base.safetensors", "-o",
                 f"{client}.partial", "--algorithm", "fedadam:lr=0.1", "--allow", "clients.toml", "--ledger",
                 f"{client}-ledger", "--key", "east")  # fmt: skip


def _private_partials(folder: Path) -> None:
    base = start_round(folder, number=0)
    for client in ("ann", "ben"):
        send(folder, base, client)
    run_here(folder, "aggregate", "--partial", "ann.update", "--weights", "base.safetensors", "-o", "ann.partial",
             "--privacy", NOISE)  # fmt: skip


def _server(folder: Path) -> None:
    """The files of a server that a device has joined, and those of the device."""
    write_npz(folder / "d.npz")
    key = new_key(folder / "ann")
    (folder / "clients.toml").write_text(f'run = "{signed.RUN}"\n[clients.ann]\nkey = "{key}"\n')
    (folder / "page").mkdir()
    (folder / "page" / "index.html").write_text("<p>")
    (folder / "tls").mkdir()
    make_certificates(folder / "tls", {"localhost"}, authority="test")
    with federation_in(folder / "server", bundle_in(folder)) as federation:
        federation.devices.join("ann", "proof", now=0)
    keep_address(folder / "server", "http://here/", None)
    open_tokens(folder / "server", make=True)


def _for_a_fleet(folder: Path) -> None:
    plan_with_two_clients(folder)
    plan = folder / "plan.toml"
    plan.write_text(plan.read_text().replace("[model]", '[model]\nkind = "dense"'))
    bundle = make_bundle(folder / "bundle")
    write_manifest(bundle.path, replace(bundle.manifest, engines=("onnxruntime",)))


def _to_fold(folder: Path) -> None:
    export_small_net(folder / "bundle")
    x = np.random.default_rng(0).random((8, *SHAPE), np.float32)
    np.savez(folder / "d.npz", x=x, y=np.arange(8) % CLASSES)
    run_here(folder, "train", "bundle", "--data", "d.npz", "--state", "own", "-o", "u")


@contextmanager
def plainly() -> Iterator[None]:
    yield


@contextmanager
def until_it_answers() -> Iterator[None]:
    """A server is interrupted when it would begin to answer."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(serve, "_show", stop)
        yield


@contextmanager
def beside_a_server() -> Iterator[Mapping[str, str]]:
    """A server is elsewhere, of whose rounds none ends."""
    place = Path.cwd().parent / "elsewhere"
    place.mkdir(exist_ok=True)
    shutil.rmtree(place)
    place.mkdir()
    with serving(place / "server", bundle_in(place), updates=1000) as served, pytest.MonkeyPatch.context() as patched:
        patched.setattr(agent, "open_engine", lambda bundle, *_, **__: SoftmaxRegression(bundle))
        yield {"link": f"{served.link.url}#join={served.link.token}"}


@contextmanager
def beside_a_hub() -> Iterator[None]:
    with serving_hub() as hub, pytest.MonkeyPatch.context() as patched:
        for name, value in (("ENDPOINT", hub.address), ("TOKEN", TOKEN), ("HOME", str(Path.cwd().parent / "hf"))):
            patched.setenv(f"HF_{name}", value)
        patched.setattr(BaseServer, "handle_error", lambda *_: None)  # of a connection that the client ended
        yield


def of_case(name: str, *more: str, given: Mapping[str, Sequence[str]], **others: Any) -> Scene:
    """The scene of a command that `kills.py` kills."""
    return Scene(prepare=CASES[name].prepare, command=(*CASES[name].command, *more), given=given, **others)


SIGNED = ("--weights", "base.safetensors", "--algorithm", "fedadam:lr=0.1", "--allow", "clients.toml", "--ledger",
          "ledger", "--strict")  # fmt: skip
SCENES: dict[str, Scene] = {
    "simulate": of_case("simulate", given=each("plan.toml", "data.npz") | each("run", good=NEW), begins=("run",)),
    "simulate-more": of_case(
        "simulate-more",
        given=each("plan.toml", "run/plan.toml", "run/work/.data/seed-4/clients.json",
                   "run/work/both/seed-4/weights/round-1.safetensors",
                   "run/work/both/seed-4/server/round-1.safetensors")
        | each("run/metrics.jsonl", good=JOURNAL) | each("run/work/.lock", good=KINDS),
        begins=("run",),
    ),
    "advise": Scene(
        prepare=_searched,
        command=("advise", "plan.toml", "-o", "search", "--kind", "fedpara", "--gamma", "0.5", "--codec", "int8"),
        given=each("plan.toml", "data.npz") | each("search", good=NEW) | each("search/search.toml", good=FREE),
        begins=("search",),
    ),
    "fold": Scene(
        prepare=_to_fold,
        command=("fold", "bundle", "--weights", "bundle/weights.safetensors", "--state", "own", "--data", "d.npz",
                 "-o", "m.onnx"),
        given=BUNDLE | each(f"own/{COMMITTED}", good=("nothing", *LINKS)) | each("d.npz")
        | each("own", good=("an empty folder",)) | each("m.onnx", good=FREE),
        around=plainly,
    ),
    "merge": of_case(
        "merge", "--strict", given=each("ann.partial", "base.safetensors") | each("both.partial", good=FREE)
    ),
    "merge-signed": Scene(
        prepare=_signed_partials,
        command=("merge", "ann.partial", "ben.partial", *SIGNED, "--key", "east", "-o", "both.partial",
                 "--max-staleness", "1", "--state", "server"),
        given=each("ann.partial", "ann.partial.dsse", "clients.toml", "east", "server/round-2.safetensors")
        | each("server", good=("an empty folder",)) | each("ledger", good=NEW)
        | each("both.partial.dsse", good=KINDS),
        begins=("ledger",),
    ),
    "finalize": of_case(
        "finalize", "--strict",
        given=each("ann.partial", "base.safetensors") | each("next.safetensors", "transcript.json", good=FREE),
    ),
    "finalize-signed": Scene(
        prepare=_signed_partials,
        command=("finalize", "ann.partial", "ben.partial", *SIGNED, "--state", "server", "--downlink-codec", "int8",
                 "--change", "c", "-o", "next.safetensors"),
        given=each("ann.partial", "ann.partial.dsse", "clients.toml", "server/round-2.safetensors")
        | each("server", "ledger", good=NEW) | each("c", good=FREE) | each("server/.lock", good=KINDS),
        begins=("ledger", "server"),
    ),
    "finalize-private": Scene(
        prepare=_private_partials,
        command=("finalize", "ann.partial", "ben.update", "--weights", "base.safetensors", "-o", "next.safetensors",
                 "--privacy", NOISE, "--privacy-ledger", "dp", "--strict"),
        given=each("ann.partial", "ben.update") | each("dp", good=NEW), begins=("dp",),
    ),
    "split": of_case("split", given=each("d.npz") | each("split", good=FREE)),
    "serve": Scene(
        prepare=_server,
        command=("serve", "bundle", "--state", "server", "--port", "0", "--page", "page", "--allow", "clients.toml",
                 "--tls-certificate", f"tls/{CERTIFICATE}", "--tls-key", f"tls/{KEY}"),
        given=each("bundle", "bundle/manifest.json", "bundle/weights.safetensors", "server/run.json", "page",
                   "clients.toml", f"tls/{CERTIFICATE}", f"tls/{KEY}")
        | each("server", "server/weights", good=NEW) | each("server/key", good=FREE)
        | each("server/devices.jsonl", good=JOURNAL) | each("server/.lock", good=KINDS)
        | each("page/index.html", good=("an empty file", "a file cut short", "text", "nested text", "bytes",
                                        "an archive")),
        begins=("server",), around=until_it_answers, code=130,
    ),
    "invite": Scene(
        prepare=_server, command=("invite", "server"), given=each("server", "server/address.json", "server/key"),
        around=plainly,
    ),
    "device": Scene(
        prepare=_server,
        command=("device", "{link}", "--data", "d.npz", "--state", "own", "--rounds", "1", "--patience", "1"),
        given=each("d.npz") | each("own", good=NEW), begins=("own",), around=beside_a_server,
    ),
    "device-trusting": Scene(
        prepare=_server,
        command=("device", "{link}", "--data", "d.npz", "--state", "own", "--key", "ann", "--ca", f"tls/{AUTHORITY}"),
        given=each("ann", f"tls/{AUTHORITY}"), begins=("own",), around=beside_a_server,
        code=2,  # the server asks for no signatures
    ),
    "fleet": Scene(
        prepare=_for_a_fleet,
        command=("fleet", "init", "bundle", "--plan", "plan.toml", "-o", "app"),
        given=BUNDLE | each("plan.toml") | each("app", good=FREE),
    ),
    "push": Scene(prepare=bundle_in, command=("push", "bundle", "me/digits"),
                  given=each("bundle", "bundle/manifest.json", "bundle/weights.safetensors"), around=beside_a_hub),
    "push-weights": Scene(
        prepare=bundle_in, command=("push", "bundle/weights.safetensors", "me/digits"),
        given=each("bundle/weights.safetensors"), around=beside_a_hub,
        code=1,  # where there is no bundle
    ),
    "pull": Scene(prepare=lambda _: None, command=("pull", "me/digits", "-o", "bundle"),
                  given=each("bundle", good=FREE), around=beside_a_hub, code=1),
    "pull-weights": Scene(prepare=lambda _: None, command=("pull", "me/digits", "--weights", "-o", "w"),
                          given=each("w", good=FREE), around=beside_a_hub, code=1),
    "report": Scene(
        prepare=half_run, command=("report", "run", "--track", "tensorboard:board"),
        given=each("run") | each("run/metrics.jsonl", good=("a file cut short",)) | each("board", good=FREE),
    ),
}  # fmt: skip


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


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory, and names of files, as Linux has")
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
