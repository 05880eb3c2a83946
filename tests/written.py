"""The commands that write, each with the files that it finds, for `kills.py`: small, and nothing left to chance."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import signed
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner
from small_round import send, start_round
from softmax_regression import SoftmaxRegression, make_bundle, write_npz
from tiny_plan import AtOnce

import device_runtime
from device_runtime import tuning
from fedpara_edge.aggregation import AggregateConfig, run_round
from fedpara_edge.cli import main as fedpara_edge
from fedpara_edge.formats.weights import read_weights, write_weights
from fedpara_edge.report.figures import CAPTIONS
from fedpara_edge.report.plots import drawing, style
from fedpara_edge.simulation import runner
from fedpara_edge.simulation.tasks import engines
from fedpara_edge.storage.atomic import replacing_folder
from fedpara_edge.trust import repository, roots
from fedpara_edge.trust.envelope import write_envelope
from fedpara_edge.trust.keys import new_key, read_signer

_NOW = datetime.now(UTC)
CLIENTS = ("ann", "ben")
ROUND = (
    "aggregate", "ann.update", "ben.update", "--weights", "base.safetensors", "-o", "next.safetensors",
)  # fmt: skip
TRAIN = (
    "train", "--data", "d.npz", "--epochs", "2", "--batch-size", "8", "--save-steps", "4", "--codec", "topk:share=0.3",
    "--state", "own", "-o", "u",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A command that writes.

    Args:
        prepare: Function that makes the files that the command finds in the working directory, which it is given too.
        command: Arguments of `fedpara-edge`.
        outputs: Files and folders that are whole or as before at any moment, in the order in which they appear.
        verified: Folder whose files are compared with signed digests before each use, so that they need no sync.
    """

    prepare: Callable[[Path], object]
    command: Sequence[str]
    outputs: Sequence[str]
    verified: str = "none"


def run_here(folder: Path, *arguments: str) -> None:
    """Run `fedpara-edge` in this process."""
    with chdir(folder), redirect_stdout(StringIO()) as out, redirect_stderr(out):
        code = exit_code(arguments)
    assert code == 0, out.getvalue()


def exit_code(arguments: Sequence[str]) -> int:
    """The exit code of `fedpara-edge` with arguments, in this process."""
    sys.argv = ["fedpara-edge", *arguments]
    try:
        fedpara_edge()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@contextmanager
def still() -> Iterator[None]:
    """Clocks that stand still, keys and names that are the same again, and the engine of softmax regression."""

    def generate() -> CryptoSigner:
        """Another key for each public one that is there."""
        return CryptoSigner(Ed25519PrivateKey.from_private_bytes(bytes([len(list(Path().glob("*.pub")))] * 32)))

    def open_engine(bundle: Any, *_: Any, **__: Any) -> SoftmaxRegression:
        return SoftmaxRegression(bundle)

    @contextmanager
    def open_pool(*_: Any) -> Iterator[AtOnce]:
        yield AtOnce()

    def make_model(recipe: Any, folder: Path) -> None:
        with replacing_folder(folder) as making:
            making.rmdir()
            make_bundle(making, seed=recipe.seed)

    replaced: list[tuple[Any, str, Any]] = [
        (time, "monotonic", lambda: 0.0),
        (secrets, "token_hex", lambda count: "ab" * count),
        (secrets, "token_bytes", lambda count: bytes(count)),
        (CryptoSigner, "generate_ed25519", generate),
        (roots, "after", lambda days: _NOW + timedelta(days=days)),
        (repository, "after", lambda days: _NOW + timedelta(days=days)),
        (device_runtime, "open_engine", open_engine),
        (tuning, "open_engine", open_engine),
        (engines, "open_engine", open_engine),
        (runner, "open_pool", open_pool),
        (runner, "make_model", make_model),
        (drawing, "draw", lambda _: dict.fromkeys(list(CAPTIONS)[:2])),
        (style, "to_png", lambda _: bytes(2000)),
        (style, "to_element", lambda *_: "<svg></svg>"),
    ]
    with ExitStack() as stack:
        for place, name, value in replaced:
            stack.enter_context(mock.patch.object(place, name, value))
        yield


def _first_training(folder: Path) -> None:
    make_bundle(folder / "bundle")
    write_npz(folder / "d.npz")


def _second_training(folder: Path) -> None:
    """A device that has taken part in a round and keeps something of it."""
    _first_training(folder)
    new_key(folder / "ann")
    run_here(folder, *TRAIN[:-1], "before", "bundle")
    base = read_weights(folder / "bundle" / "weights.safetensors")
    later = {name: tensor + np.float32(0.25) for name, tensor in base.tensors.items()}
    write_weights(folder / "w1", replace(base, round=1, tensors=later))


def _repository(folder: Path) -> None:
    """A repository with round 1, and what leads to round 2."""
    bundle = make_bundle(folder / "bundle")
    write_npz(folder / "d.npz")
    base = read_weights(bundle.file("weights.safetensors"))
    for number in (1, 2):
        update = send(folder, base, "ann", name=f"ann-{number}")
        run_round(
            [update], bundle.file("weights.safetensors") if number == 1 else folder / "w1", folder / f"w{number}",
            AggregateConfig(downlink_codec="int8"), state=folder / "server", change=folder / f"c{number}",
        )  # fmt: skip
        base = read_weights(folder / f"w{number}")
    keys = signed.make_keys(folder)
    root = signed.first_root(folder, keys)
    signed.release(folder / "repository", root, keys, bundle=bundle.path)
    signed.release(folder / "repository", root, keys, weights=folder / "w1", changes=(folder / "c1",))


def _round(folder: Path, **stated: Any) -> None:
    start_round(folder, number=0)
    for client in CLIENTS:
        send(folder, read_weights(folder / "base.safetensors"), client, codec="int8", **stated)


def partials(folder: Path) -> None:
    _round(folder)
    for client in CLIENTS:
        update, weights = f"{client}.update", "base.safetensors"
        run_here(folder, "aggregate", update, "--partial", "--weights", weights, "-o", f"{client}.partial")


def signed_round(folder: Path) -> None:
    """The third round of a server that keeps a state, a ledger and changes."""
    base = start_round(folder, number=0)
    lines = [f'run = "{signed.RUN}"']
    for client in CLIENTS:
        lines += [f"[clients.{client}]", f'key = "{new_key(folder / client)}"']
    (folder / "clients.toml").write_text("\n".join(lines))
    config = AggregateConfig(algorithm="fedadam:lr=0.1", downlink_codec="int8")
    for number in range(3):
        for client in CLIENTS:
            path = send(folder, base, client)
            write_envelope(path, path, read_signer(folder / client), signed.RUN)
        if number < 2:
            updates = [folder / f"{client}.update" for client in CLIENTS]
            weights, change = folder / "base.safetensors", folder / f"change-{number}"
            run_round(updates, weights, folder / "next", config, state=folder / "server", change=change)
            (folder / "next").replace(weights)
            base = read_weights(weights)


def _dealt(folder: Path) -> None:
    """Rows that are dealt already, to others than they will be."""
    write_npz(folder / "d.npz", examples=40)
    run_here(folder, "split", "d.npz", "--clients", "3", "--seed", "5", "-o", "split")


PLAN = """
name = "still"
rounds = 1
seeds = [4]
[data]
path = "data.npz"
split = "iid"
clients = 2
test = ["x_test", "y_test"]
[model]
name = "mlp"
classes = 3
input_shape = [4]
[train]
batch_size = 8
lr = 0.1
codec = "topk:share=0.3"
[aggregate]
downlink_codec = "int8"
[arms.both]
train.algorithm = "feddyn"
aggregate.algorithm = "feddyn"
"""
ALONE = "[arms.alone]\nlocal_only = true\n"


def plan_with_two_clients(folder: Path) -> None:
    arrays = np.load(write_npz(folder / "data.npz", examples=20))
    np.savez(folder / "data.npz", **arrays, x_test=arrays["x"], y_test=arrays["y"])
    (folder / "plan.toml").write_text(PLAN)


def half_run(folder: Path) -> None:
    """A run of one round, whose plan has two and another arm by now."""
    plan_with_two_clients(folder)
    run_here(folder, "simulate", "plan.toml", "-o", "run")
    (folder / "plan.toml").write_text(PLAN.replace("rounds = 1", "rounds = 2") + ALONE)


def _keys(folder: Path) -> None:
    keys = signed.make_keys(folder)
    signed.first_root(folder, keys, signers=("alice",))


CASES: dict[str, Case] = {
    "train": Case(_first_training, (*TRAIN, "bundle"), ("u",)),
    "train-signed": Case(
        _second_training,
        (*TRAIN, "bundle", "--weights", "w1", "--key", "ann", "--run", signed.RUN),
        ("u.dsse", "u"),
    ),
    "train-private": Case(
        _second_training,
        (*TRAIN, "bundle", "--weights", "w1", "--privacy", "gaussian:clip=0.5,noise=2,epsilon=9,delta=1e-5"),
        ("own/privacy.json", "u"),
    ),
    "train-repository": Case(
        _repository, (*TRAIN, "--repository", "repository", "--root", "root.json"), ("u",), "own/repository"
    ),
    "aggregate": Case(_round, ROUND, ("next.safetensors",)),
    "aggregate-signed": Case(
        signed_round,
        (*ROUND, "--algorithm", "fedadam:lr=0.1", "--downlink-codec", "int8", "--state", "server", "--keep", "2",
         "--change", "change-2", "--allow", "clients.toml", "--transcript", "transcript.json"),
        ("change-2", "server/round-3.safetensors", "transcript.json", "next.safetensors"),
    ),
    "aggregate-device-privacy": Case(
        partial(_round, privacy={"name": "gaussian", "clip": 0.5, "noise": 2.0}),
        (*ROUND, "--device-privacy", "gaussian:epsilon=9,delta=1e-5", "--privacy-ledger", "dp"),
        ("dp/devices.json", "next.safetensors"),
    ),
    "aggregate-partial": Case(
        signed_round,
        ("aggregate", "ann.update", "ben.update", "--partial", "--weights", "base.safetensors", "-o", "both.partial",
         "--allow", "clients.toml", "--ledger", "ledger", "--key", "ann"),
        ("ledger/round-2.json", "both.partial.dsse", "both.partial"),
    ),
    "merge": Case(
        partials,
        ("merge", "ann.partial", "ben.partial", "--weights", "base.safetensors", "-o", "both.partial"),
        ("both.partial",),
    ),
    "finalize": Case(
        partials,
        ("finalize", "ann.partial", "ben.partial", "--weights", "base.safetensors", "-o", "next.safetensors",
         "--transcript", "transcript.json"),
        ("transcript.json", "next.safetensors"),
    ),
    "apply": Case(_repository, ("apply", "bundle/weights.safetensors", "c1", "c2", "-o", "out"), ("out",)),
    "publish": Case(
        _repository,
        ("publish", "repository", "--root", "root.json", "--key", "targets", "--key", "online", "--weights", "w2",
         "--change", "c2"),
        ("repository/metadata/timestamp.json",),
    ),
    "publish-bundle": Case(
        lambda folder: (_repository(folder), (folder / "repository").rename(folder / "other")),
        ("publish", "repository", "--root", "root.json", "--key", "targets", "--key", "online", "--bundle", "bundle",
         "--run", signed.RUN),
        ("repository/metadata/timestamp.json",),
    ),
    "keys-new": Case(lambda _: None, ("keys", "new", "alice", "bob"), ("alice", "alice.pub", "bob", "bob.pub")),
    "keys-root": Case(
        _keys,
        ("keys", "root", "--previous", "root.json", "--root-key", "alice", "--root-key", "bob", "--threshold", "2",
         "--key", "carol", "-o", "2.root.json"),
        ("2.root.json",),
    ),
    "keys-sign": Case(_keys, ("keys", "sign", "root.json", "--key", "bob"), ("root.json",)),
    "split": Case(
        lambda folder: write_npz(folder / "d.npz", examples=40),
        ("split", "d.npz", "--clients", "2", "--test-share", "0.2", "-o", "split"),
        ("split",),
    ),
    "split-overwrite": Case(
        _dealt, ("split", "d.npz", "--clients", "2", "--test-share", "0.2", "-o", "split", "--overwrite"), ("split",)
    ),
    "simulate": Case(plan_with_two_clients, ("simulate", "plan.toml", "-o", "run"), ("run/plan.toml",)),
    "simulate-more": Case(half_run, ("simulate", "plan.toml", "-o", "run"), ("run/plan.toml",)),
    "report": Case(half_run, ("report", "run", "-o", "out"), ("out/report.html",)),
    "report-csv": Case(half_run, ("report", "run", "--csv", "table.csv"), ("table.csv",)),
}  # fmt: skip
