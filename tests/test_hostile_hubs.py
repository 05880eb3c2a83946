"""What a hostile Hub may answer to `pull`: one line, bounded time, memory and disk, and nothing left behind."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from any_server import answer, answering, dripping
from command_line import Command
from hub_server import TOKEN, Hub, serving_hub
from small_net import SmallBundle

from fedpara_edge.hub import download, repository
from fedpara_edge.storage import arriving

NAME = "me/digits"
MANY = 3 << 20


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for module in (repository, download):
        monkeypatch.setattr(module, "MAX_BYTES", 1 << 20)  # of lists and manifests


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        yield hub


ANSWERS = {
    "no end": (b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * MANY, r"at most 1048576 bytes, found more"),
    "no end in chunks": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"%x\r\n%b\r\n" % (MANY, b"[" * MANY),
        r"at most 1048576 bytes, found more",
    ),
    "a huge length": (answer("200 OK", Content_Length="9" * 15), r"at most 1048576 bytes, found 9{15} announced"),
    "an endless length": (answer("200 OK", Content_Length="9" * 3000), r"expected"),
    "a length that is too large": (answer("200 OK", b"[1]", Content_Length="900"), r"expected to reach the Hub"),
    "compressed": (
        answer("200 OK", gzip.compress(b"[" * (64 << 20)), Content_Encoding="gzip"),
        r"expected an answer as it is, found one in .?gzip",
    ),
    "a file of this device": (answer("302 Found", Location="file:///etc/passwd"), r"expected to reach the Hub"),
    "round and round": (answer("302 Found", Location="/"), r"expected to reach the Hub"),
    "an error without end": (b"HTTP/1.1 500 Oh\r\n\r\n" + b"x" * MANY, r"expected the Hub to take this"),
    "no HTTP": (b"\0" * 5000, r"expected to reach the Hub"),
    "nothing": (b"", r"expected to reach the Hub"),
}


@pytest.mark.parametrize("weights", [(), ("--weights",)])
@pytest.mark.parametrize("name", ANSWERS)
def test_any_answer_is_refused_in_one_line_and_nothing_is_left(
    name: str, weights: tuple[str, ...], tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, expected = ANSWERS[name]
    before = {*tmp_path.iterdir()} - {tmp_path / "home"}
    with answering(said) as connection:
        monkeypatch.setenv("HF_ENDPOINT", connection.url.rstrip("/"))
        refused = run("pull", NAME, *weights, "-o", tmp_path / "out")
    assert refused.code not in (0, 70), refused.err
    assert re.search(expected, refused.err), refused.err
    assert refused.err.count("\n") == 1
    assert {*tmp_path.iterdir()} - {tmp_path / "home"} == before


@pytest.mark.parametrize("status", ["200 OK", "404 Not Found"])
def test_a_hub_that_drips_is_given_up(
    status: str, tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arriving, "GRACE_SECONDS", 0.3)
    with dripping(status) as connection:
        monkeypatch.setenv("HF_ENDPOINT", connection.url.rstrip("/"))
        refused = run("pull", NAME, "-o", tmp_path / "out")
    assert re.search("at least 1000 bytes a second, found [0-9]+ in", refused.err), refused.err
    assert not (tmp_path / "out").exists()


def test_a_bundle_beyond_the_limit_is_refused_before_a_file_of_it_is_fetched(
    hub: Hub, small_bundle: SmallBundle, tmp_path: Path, run: Command
) -> None:
    bundle = small_bundle()
    assert run("push", bundle.path, NAME).code == 0
    manifest = json.loads(hub.repositories[NAME]["manifest.json"])
    manifest["files"]["weights.safetensors"]["bytes"] = 3 << 20
    files = hub.repositories[NAME]
    hub.repositories[NAME] = {"manifest.json": json.dumps(manifest).encode()}
    refused = run("pull", NAME, "-o", tmp_path / "out", "--max-mb", "2")
    assert re.search(r"me/digits: expected at most 2097152 bytes, found 3[0-9]{6} in its", refused.err), refused.err
    assert "--max-mb" in refused.err
    assert not (tmp_path / "out").exists()

    hub.repositories[NAME] = {**files, "weights/round-1.safetensors": bytes(3 << 20)}
    refused = run("pull", NAME, "--weights", "-o", tmp_path / "out", "--max-mb", "2")
    assert "expected at most 2097152 bytes, found 3145728 announced" in refused.err
    assert not (tmp_path / "out").exists()


def test_another_host_gets_no_token(
    hub: Hub, small_bundle: SmallBundle, tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = small_bundle()
    assert run("push", bundle.path, NAME).code == 0
    elsewhere = f"{hub.address}/{NAME}/resolve/main/manifest.json"
    with answering(answer("302 Found", Location=elsewhere)) as connection:
        monkeypatch.setenv("HF_ENDPOINT", connection.url.rstrip("/"))
        run("pull", NAME, "-o", tmp_path / "out")
    assert hub.tokens[-1] is None
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    assert run("pull", NAME, "-o", tmp_path / "out").code == 0
    assert hub.tokens[-1] == f"Bearer {TOKEN}"
