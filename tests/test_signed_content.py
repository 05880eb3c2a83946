"""What was verified is what counts: nothing changes between the check of a signature and the use of the file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from small_round import random_tensors, send, start_round

from fedpara_edge.aggregation import AggregateConfig, Round, run_round
from fedpara_edge.errors import TooFewUpdatesError
from fedpara_edge.storage.tensorfile import TensorFile
from fedpara_edge.trust.clients import Client, Clients, Member
from fedpara_edge.trust.envelope import write_envelope
from fedpara_edge.trust.keys import new_key, parse_public, read_signer
from fedpara_edge.trust.ledger import OPEN_ROUNDS, open_ledger
from fedpara_edge.trust.signatures import SignatureGate

RUN = "winter"


class Server:
    """A server that takes signed updates of two clients."""

    def __init__(self, folder: Path, number: int = 3) -> None:
        self.folder = folder
        public = {name: new_key(folder / name) for name in ("ann", "ben")}
        members = [Member(name=name, key=parse_public(key), entry=Client(key=key)) for name, key in public.items()]
        self.clients = Clients(run=RUN, members=members)
        self.start(number)

    def start(self, number: int) -> None:
        """Begin with weights of a round."""
        self.weights = start_round(self.folder, number=number)

    def send(self, client: str, seed: int = 1) -> Path:
        path = send(self.folder, self.weights, client, change=random_tensors(self.weights.layout, seed))
        write_envelope(path, path, read_signer(self.folder / client), RUN)
        return path

    def round(self, *paths: Path) -> Round:
        """A round that overwrites the one before."""
        base, output = self.folder / "base.safetensors", self.folder / "next.safetensors"
        with open_ledger(self.folder / "ledger", RUN) as ledger:
            gate = SignatureGate(self.clients, ledger)
            return run_round(paths, base, output, AggregateConfig(), gate=gate, overwrite=True)


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


Step = Literal["digest_while_read", "reopen", "check_read"]
"""What is done with a file: its signature was verified, its values are read, and it is hashed to the end."""


def around(
    step: Step, monkeypatch: pytest.MonkeyPatch, bad: Path, before: Callable[[], object], after: Callable[[], object]
) -> None:
    """Call functions before and after a step with a file."""
    done = getattr(TensorFile, step)

    def watched(file: TensorFile, *given: Any) -> Any:
        if file.path != bad:
            return done(file, *given)
        before()
        try:
            return done(file, *given)
        finally:
            after()

    monkeypatch.setattr(TensorFile, step, watched)


@pytest.mark.parametrize(("step", "code"), [("digest_while_read", "changed"), ("reopen", "digest")])
@pytest.mark.skipif(sys.platform == "win32", reason="Windows keeps no time of change")
def test_a_file_changed_after_its_signature_was_verified(
    step: Step, code: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place, with the time of its modification set back."""
    bad, good = server.send("ann"), server.send("ben")

    def change() -> None:
        time.sleep(0.02)  # more than the clock of the file system's tick
        status = bad.stat()
        with bad.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\0\0\0\0")
        os.utime(bad, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert bad.stat().st_mtime_ns == status.st_mtime_ns

    around(step, monkeypatch, bad, lambda: None, change)
    done = server.round(bad, good)
    assert [(update.client, update.code) for update in done.aggregation.rejected] == [("ann", code)]
    assert [update.client for update in done.aggregation.accepted] == ["ben"]


@pytest.mark.parametrize("step", ["digest_while_read", "reopen", "check_read"])
def test_a_file_exchanged_for_the_signed_one_while_that_is_verified(
    step: Step, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, good = server.send("ann"), server.send("ben")
    signed, bad = server.folder / "signed", server.folder / "bad"
    path.replace(signed)
    send(server.folder, server.weights, "ann", name="ann", change=random_tensors(server.weights.layout, 2))

    def show_signed() -> None:
        path.replace(bad)
        signed.replace(path)

    def show_bad() -> None:
        path.replace(signed)
        bad.replace(path)

    around(step, monkeypatch, path, show_signed, show_bad)
    done = server.round(path, good)
    ((client, code),) = [(update.client, update.code) for update in done.aggregation.rejected]
    assert (client, code in ("forged", "changed")) == ("ann", True)
    assert [update.client for update in done.aggregation.accepted] == ["ben"]


def test_a_ledger_closes_old_rounds_and_forgets_them(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, newest = server.folder / "ledger", 3 + OPEN_ROUNDS
    for number in (3, 4, newest - 1):
        server.start(number)
        server.round(server.send("ann"), server.send("ben"))
    kept = {f"round-{number}.json" for number in (3, 4, newest - 1)}
    assert {path.name for path in ledger.glob("*.json")} == kept
    server.start(newest)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", unlink_unless_of_the_ledger)
        with pytest.raises(KeyboardInterrupt):  # killed before what is closed was removed
            server.round(server.send("ann"))
    check_closed(server, 3)
    server.start(newest)
    server.round(server.send("ann"))
    assert {path.name for path in ledger.glob("*.json")} == {*kept, f"round-{newest}.json"} - {"round-3.json"}
    check_closed(server, 3)
    server.start(4)  # open as long as its entries are kept: the same updates count, and no others
    done = server.round(server.send("ann"), server.send("ben", seed=9))
    assert [(update.client, update.code) for update in done.aggregation.rejected] == [("ben", "replay")]


def unlink_unless_of_the_ledger(path: Path, missing_ok: bool = False, *, unlink: Any = Path.unlink) -> None:
    if path.parent.name == "ledger":
        raise KeyboardInterrupt
    unlink(path, missing_ok=missing_ok)


def check_closed(server: Server, number: int) -> None:
    server.start(number)
    with pytest.raises(TooFewUpdatesError, match="1 replay") as found:
        server.round(server.send("ann"))
    (error,) = found.value.rejected
    assert f"expected an update of round {number + 1} or later, found one of round {number}, which is closed" in str(
        error
    )
