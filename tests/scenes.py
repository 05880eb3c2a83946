"""Scenes of commands that end well, and what may be in the place of each file that they are given."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from socketserver import BaseServer
from typing import Any

import numpy as np
import pytest
import signed
from hub_server import TOKEN, serving_hub
from served import bundle_in, federation_in, serving
from small_net import CLASSES, SHAPE, export_small_net
from small_round import send, start_round
from softmax_regression import SoftmaxRegression, make_bundle, write_npz
from written import CASES, half_run, plan_with_two_clients, run_here, signed_round, still

from device_runtime import tuning
from device_runtime.state import COMMITTED
from fedpara_edge.cli import serve
from fedpara_edge.formats.bundle import write_manifest
from fedpara_edge.serving.certificates import AUTHORITY, CERTIFICATE, KEY, make_certificates
from fedpara_edge.serving.invitation import keep_address
from fedpara_edge.serving.tokens import open_tokens
from fedpara_edge.trust.keys import new_key

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
        patched.setattr(tuning, "open_engine", lambda bundle, *_, **__: SoftmaxRegression(bundle))
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
