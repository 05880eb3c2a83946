"""What a hostile Hub may answer to `pull` and `push`: one line, bounded time, memory and disk, and nothing left."""

from __future__ import annotations

import gzip
import json
import logging
import re
import socket
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
from any_server import answer, answering, dripping
from command_line import Command
from hub_server import TOKEN, Hub, serving_hub
from small_net import SmallBundle

from fedpara_edge.errors import FedparaError
from fedpara_edge.hub import answers, download, repository
from fedpara_edge.storage import arriving

NAME = "me/digits"
MANY = 3 << 20


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for module in (repository, download, answers):
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
    "an error that is a list": (answer("500 Oh", b"[1]"), r"can't be understood"),
    "an error without number": (answer("400 Oh", b'{"errors": 7}'), r"can't be understood"),
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


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that huggingface_hub waits before it asks again, which nobody waits for."""
    found: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=found.append))
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handlers", [])  # of the stderr of an earlier test
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # an earlier test may have imported it
    return found


ANSWERS_TO_PUSH = {
    **ANSWERS,
    "no JSON": (answer("200 OK", b"{"), r"can't be understood"),
    "other JSON": (answer("200 OK", b"[1]"), r"can't be understood"),
    "deep JSON": (answer("200 OK", b"[" * 100_000), r"can't be understood"),
    "other values": (answer("200 OK", b'{"url": 3, "files": [{"path": 3}], "commitUrl": [], "commitOid": {}}'), ""),
    "wait": (answer("429 Too Many Requests", b"{}", Retry_After="9" * 30), r"429 Too Many Requests"),
    "wait for a conflict": (
        answer("409 Conflict", b"Cannot create repo: another conflicting operation is in progress"),
        "",
    ),
}
REQUESTS = 5
"""Requests of `push`: for the repository, the card, its check, the ways of the files, and the commit."""


@pytest.mark.parametrize("number", range(REQUESTS))
@pytest.mark.parametrize("name", ANSWERS_TO_PUSH)
def test_from_any_request_on_any_answer_to_push_is_refused_in_one_line(
    name: str, number: int, hub: Hub, small_bundle: SmallBundle, run: Command, waits: list[float]
) -> None:
    said, expected = ANSWERS_TO_PUSH[name]
    hub.instead = dict.fromkeys(range(number, 500), said)
    refused = run("push", small_bundle().path, NAME)
    assert refused.code not in (0, 70), refused.err
    assert refused.err.count("\n") == 1
    assert len(refused.err) < 700
    if number in (0, 3):  # others ask for what the answer of one request may do without
        assert re.search(expected, refused.err), refused.err
    assert sum(waits) < 60
    assert hub.requests < 200
    assert not hub.commits


def test_a_push_is_as_many_requests_as_are_tried(hub: Hub, small_bundle: SmallBundle, run: Command) -> None:
    assert run("push", small_bundle().path, NAME).code == 0
    assert hub.requests == REQUESTS


@pytest.mark.parametrize("name", [*ANSWERS_TO_PUSH, "another place", "a file of this device for a place", "many parts"])
def test_any_answer_about_large_files_is_refused_in_one_line(
    name: str, hub: Hub, small_bundle: SmallBundle, run: Command, waits: list[float]
) -> None:
    bundle = small_bundle().path
    names = [*(path.name for path in bundle.iterdir()), "README.md"]
    modes = [{"path": each, "uploadMode": "lfs", "shouldIgnore": False} for each in names]
    place = f"{hub.address}/place"
    places = {
        "another place": {"upload": {"href": place}, "verify": {"href": place}},
        "a file of this device for a place": {"upload": {"href": "file:///etc/passwd"}},
        "many parts": {"upload": {"href": place, "header": {"chunk_size": "1", "1": place}}},
    }
    about = [
        {"oid": sha256(path.read_bytes()).hexdigest(), "size": path.stat().st_size, "actions": places.get(name)}
        for path in bundle.iterdir()
    ]
    listed = answer("200 OK", json.dumps({"objects": about, "transfer": "multipart"}).encode())
    said = ANSWERS_TO_PUSH[name][0] if name in ANSWERS_TO_PUSH else answer("500 Oh", b"[1]")
    hub.instead = {**dict.fromkeys(range(4, 500), said), 3: answer("200 OK", json.dumps({"files": modes}).encode())}
    if name in places:
        hub.instead[4] = listed
    refused = run("push", bundle, NAME)
    assert refused.code not in (0, 70), refused.err
    assert refused.err.count("\n") == 1
    assert len(refused.err) < 700
    assert hub.requests < 500
    assert sum(waits) < 200
    assert not hub.commits


@pytest.mark.parametrize("command", ["pull", "push"])
@pytest.mark.parametrize("status", ["200 OK", "404 Not Found"])
def test_a_hub_that_drips_is_given_up(
    status: str, command: str, small_bundle: SmallBundle, tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("push", small_bundle().path, NAME) if command == "push" else ("pull", NAME, "-o", tmp_path / "out")
    monkeypatch.setattr(arriving, "GRACE_SECONDS", 0.3)
    with dripping(status) as connection:
        monkeypatch.setenv("HF_ENDPOINT", connection.url.rstrip("/"))
        refused = run(*arguments)
    assert re.search("at least 1000 bytes a second, found [0-9]+ in", refused.err), refused.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["pull", "push"])
def test_a_hub_that_says_nothing_is_given_up(
    command: str, small_bundle: SmallBundle, tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("push", small_bundle().path, NAME) if command == "push" else ("pull", NAME, "-o", tmp_path / "out")
    monkeypatch.setattr(answers, "TIMEOUT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
        refused = run(*arguments)
    assert (refused.code, "expected to reach the Hub, found timed out" in refused.err) == (1, True), refused.err


def test_an_encrypted_hub_leads_nowhere_without_encryption() -> None:
    from huggingface_hub.utils import get_session

    with answering(answer("200 OK")) as connection:
        answers.bound_answers("https://hub.example")
        with pytest.raises(FedparaError, match="expected an address with encryption, found one without"):
            get_session().post(connection.url, content=b"secret")
        answers.bound_answers("http://hub.example")
        assert get_session().post(connection.url, content=b"secret").status_code == 200


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
