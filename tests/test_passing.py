"""Digests of files from what is read of them for their values: of each byte once, whatever comes in which order."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_round import layer, layout_of, random_tensors, send, start_round

from fedpara_edge.aggregation import AggregateConfig, Round, run_round
from fedpara_edge.aggregation.gate import HashingGate
from fedpara_edge.codecs.codec import CHUNK_ENTRIES
from fedpara_edge.errors import TooFewUpdatesError, TrustError
from fedpara_edge.formats.weights import Weights
from fedpara_edge.storage import passing
from fedpara_edge.storage.passing import PassingDigest
from fedpara_edge.storage.tensorfile import TensorFile
from fedpara_edge.trust.clients import Client, Clients, Member
from fedpara_edge.trust.envelope import write_envelope
from fedpara_edge.trust.keys import new_key, parse_public, read_signer
from fedpara_edge.trust.ledger import open_ledger
from fedpara_edge.trust.signatures import SignatureGate

CONTENT = bytes(np.random.default_rng(0).integers(0, 256, 5000, np.uint8))
SIZE = len(CONTENT)
RUN = "winter"


def reading(counted: Counter[int]) -> passing.Read:
    """Function that reads `CONTENT`, and counts how often each byte was read."""

    def read(offset: int, out: memoryview) -> int:
        part = CONTENT[offset : offset + len(out)]
        out[: len(part)] = part
        counted.update(range(offset, offset + len(part)))
        return len(part)

    return read


PIECES = st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 900)), max_size=30)


@given(pieces=PIECES, early=st.sampled_from([0, 700, SIZE]))
@settings(max_examples=300)
def test_pieces_in_any_order_have_the_digest_of_the_whole(pieces: list[tuple[int, int]], early: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(passing, "EARLY_BYTES", early)
        found = PassingDigest(reading(Counter()))
        for start, length in pieces:
            found.add(start, memoryview(CONTENT)[start : start + length])
            kept = sum(map(len, found._early.values()))
            assert kept <= early
        assert found.finish() == hashlib.sha256(CONTENT).hexdigest()


@given(order=st.permutations(range(10)))
def test_what_passed_is_not_read_again(order: list[int]) -> None:
    counted: Counter[int] = Counter()
    found = PassingDigest(reading(counted))
    for number in order:
        found.add(500 * number, memoryview(CONTENT)[500 * number : 500 * number + 500])
    assert found.finish() == hashlib.sha256(CONTENT).hexdigest()
    assert not counted


def test_threads_may_add_pieces_at_once() -> None:
    found = PassingDigest(reading(Counter()))

    def add(first: int) -> None:
        for start in range(first, SIZE, 200):
            found.add(start, memoryview(CONTENT)[start : start + 100])

    threads = [threading.Thread(target=add, args=(first,)) for first in (0, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found.finish() == hashlib.sha256(CONTENT).hexdigest()


@contextmanager
def counting(patched: pytest.MonkeyPatch) -> Iterator[tuple[Counter[str], Counter[str]]]:
    """Bytes of tensors that are read of each file, and bytes that are hashed of all files."""
    read, hashed = Counter[str](), Counter[str]()
    read_some = TensorFile._read_some

    def watched(file: TensorFile, offset: int, out: memoryview) -> int:
        count = read_some(file, offset, out)
        if offset >= getattr(file, "data_offset", offset + 1):  # unknown while the table is read
            read[file.path.name] += count
        return count

    class Hash:
        def __init__(self) -> None:
            self._found = hashlib.sha256()

        def update(self, piece: memoryview) -> None:
            hashed["all"] += piece.nbytes
            self._found.update(piece)

        def hexdigest(self) -> str:
            return self._found.hexdigest()

    with patched.context() as patch:
        patch.setattr(TensorFile, "_read_some", watched)
        patch.setattr(passing, "hashlib", SimpleNamespace(sha256=Hash))
        yield read, hashed


CODECS = ("float32", "float16", "int8", "int4", "uniform", "topk:share=0.2")


@pytest.fixture
def large(tmp_path: Path) -> Weights:
    """Weights of five chunks and a bit."""
    side = int((5.2 * CHUNK_ENTRIES) ** 0.5)
    return start_round(tmp_path, layout_of(layer("fc", (side, side), kind="dense")))


class Server:
    """A server that takes signed updates, one of each codec."""

    def __init__(self, folder: Path, weights: Weights) -> None:
        self.folder, members, self.paths = folder, [], []
        for number, codec in enumerate(CODECS):
            name = f"client-{number}"
            key = new_key(folder / name)
            members.append(Member(name=name, key=parse_public(key), entry=Client(key=key)))
            change = random_tensors(weights.layout, number, 0.1)
            path = send(folder, weights, name, change=change, codec=codec)
            write_envelope(path, path, read_signer(folder / name), RUN)
            self.paths.append(path)
        self.clients = Clients(run=RUN, members=members)

    def round(self, output: str, **config: Any) -> Round:
        with open_ledger(self.folder / f"ledger-{output}", RUN) as ledger:
            gate = SignatureGate(self.clients, ledger)
            given = AggregateConfig(**config)
            return run_round(self.paths, self.folder / "base.safetensors", self.folder / output, given, gate=gate)


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"rule": "median"}], ids=str)
def test_signed_updates_are_read_and_hashed_once(
    options: dict[str, Any], tmp_path: Path, large: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(tmp_path, large)
    run_round(server.paths, tmp_path / "base.safetensors", tmp_path / "plain", AggregateConfig(**options))
    with counting(monkeypatch) as (read, hashed):
        done = server.round("signed", **options)
    assert len(done.aggregation.accepted) == len(CODECS)
    assert (tmp_path / "signed").read_bytes() == (tmp_path / "plain").read_bytes()
    for path in server.paths:
        with TensorFile(path, format=None, error=TrustError) as file:
            assert read[path.name] == path.stat().st_size - file.data_offset, path
    assert hashed["all"] == sum(path.stat().st_size for path in server.paths)


def test_the_digests_are_those_of_the_files(tmp_path: Path, large: Weights) -> None:
    server = Server(tmp_path, large)
    expected = {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in server.paths}
    signed = server.round("signed").aggregation
    hashing = run_round(server.paths, tmp_path / "base.safetensors", tmp_path / "hashed", gate=HashingGate())
    for done in (signed, hashing.aggregation):
        assert {each.client: each.sha256 for each in done.accepted} == expected


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"rule": "krum"}, {"rule": "median"}], ids=str)
def test_another_content_under_a_signature_leaves_no_trace(
    options: dict[str, Any], tmp_path: Path, large: Weights
) -> None:
    server = Server(tmp_path, large)
    forged = server.paths[0]
    send(tmp_path, large, forged.stem, change=random_tensors(large.layout, 99, 0.1))
    done = server.round("signed", **options).aggregation
    assert [(each.client, each.code) for each in done.rejected] == [(forged.stem, "forged")]
    run_round(server.paths[1:], tmp_path / "base.safetensors", tmp_path / "plain", AggregateConfig(**options))
    assert (tmp_path / "signed").read_bytes() == (tmp_path / "plain").read_bytes()


def test_content_that_is_damaged_too_is_called_forged(tmp_path: Path, large: Weights) -> None:
    server = Server(tmp_path, large)
    path = server.paths[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    done = server.round("signed").aggregation
    assert [(each.client, each.code) for each in done.rejected] == [(path.stem, "forged")]
    with pytest.raises(TooFewUpdatesError, match="1 forged"):
        server.round("all", min_updates=len(CODECS))
    with pytest.raises(TrustError, match="expected the content that was signed, found other"):
        server.round("strict", strict=True)
