"""A device and what any server may answer: a `FedparaError` of one line, a bounded wait, and nothing left behind."""

import gzip
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import signed
from any_server import answer, answering, dripping
from small_round import send as write_update
from small_round import start_round

from device_runtime.agent import transfers
from device_runtime.agent.connection import LONGEST_WAIT_SECONDS, Connection
from device_runtime.agent.link import JoinLink
from device_runtime.agent.member import Member
from device_runtime.agent.transfers import fetch, send
from fedpara_edge.errors import FedparaError
from fedpara_edge.storage import arriving
from fedpara_edge.storage.arriving import TooMuchError
from fedpara_edge.trust.client import receive

DIGEST = "a" * 64


ANSWERS = {
    "nothing": b"",
    "no HTTP": b"\0" * 5000,
    "half a line": b"HTTP/1.1 2",
    "an endless line": b"HTTP/1.1 200 " + b"x" * 100_000,
    "an endless field": b"HTTP/1.1 200 OK\r\nA: " + b"x" * 100_000,
    "many fields": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 500 + b"\r\n",
    "a huge length": answer("200 OK", Content_Length="9" * 5000),
    "a negative length": answer("200 OK", Content_Length="-5"),
    "a broken chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "a huge chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"f" * 30 + b"\r\nx",
    "no JSON": answer("200 OK", b"\xff\xfe"),
    "deep JSON": answer("201 Created", b"[" * 100_000),
    "another status": answer("999 \xe9"),
    "elsewhere": answer("302 Found", Location="file:///etc/passwd"),
    "too much": answer("416 Range Not Satisfiable"),
    "a long patience": answer("503 Busy", Retry_After="9" * 5000),
    "a token of two lines": answer("201 Created", b'{"client": "ann", "token": "a\\nb"}'),
    "a token that is no ASCII": answer("201 Created", '{"client": "ann", "token": "\u2603"}'.encode()),
    "a place that is none": answer("201 Created", Location="/\xe9"),
    "a place with a space": answer("201 Created", Location="/a b"),
    "a huge offset": answer("204 No Content", Upload_Offset="9" * 5000),
    "an offset beyond the end": answer("204 No Content", Upload_Offset="9" * 9),
}  # fmt: skip


def join(connection: Connection, folder: Path) -> None:
    member = Member(folder, connection)
    member.join(JoinLink(url=connection.url, token="t" * 40, ca=None), None)
    member.task(wait=False)


def send_again(connection: Connection, folder: Path) -> None:
    update = write_update(folder, start_round(folder), "ann")
    note = update.with_name(f"{update.name}.json")
    note.write_text(f'{{"sha256": "{transfers.sha256_of(update)}", "location": "/updates/x"}}')
    send(connection, "updates", update)


def receive_from(connection: Connection, folder: Path) -> None:
    root = signed.first_root(folder, signed.make_keys(folder))
    receive(connection.url, root, folder / "cache")


ASKING: dict[str, Callable[[Connection, Path], object]] = {
    "join": join,
    "task": lambda connection, folder: Member(folder, connection).task(wait=False),
    "fetch": lambda connection, folder: fetch(connection, f"files/{DIGEST}", folder / "file", DIGEST),
    "send": lambda connection, folder: send(connection, "updates", write_update(folder, start_round(folder), "ann")),
    "send again": send_again,
    "repository": receive_from,
}


def refusal(call: Callable[[], object]) -> FedparaError | None:
    """The error that a call ends with; None if it doesn't."""
    try:
        call()
    except FedparaError as error:
        return error
    return None


@pytest.mark.parametrize("asking", ASKING)
@pytest.mark.parametrize("name", ANSWERS)
def test_any_answer_is_taken_or_refused_in_one_line(name: str, asking: str, tmp_path: Path) -> None:
    with answering(ANSWERS[name]) as connection:
        error = refusal(lambda: ASKING[asking](connection, tmp_path))
        assert "\n" not in str(error)
        assert len(str(error)) < 1000
        assert (getattr(error, "after_seconds", None) or 0.0) <= LONGEST_WAIT_SECONDS
        assert not (tmp_path / "file").exists()


def test_a_file_without_end_fills_no_disk(tmp_path: Path) -> None:
    body = b"HTTP/1.1 200 OK\r\n\r\n" + bytes(4 << 20)
    with answering(body) as connection, pytest.raises(TooMuchError, match="at most 1048576 bytes"):
        fetch(connection, f"files/{DIGEST}", tmp_path / "file", DIGEST, max_bytes=1 << 20)
    assert list(tmp_path.iterdir()) == []


def test_an_answer_without_end_fills_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("device_runtime.agent.connection.MAX_ANSWER_BYTES", 1 << 20)
    with answering(b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * (4 << 20)) as connection:
        for asking in ("join", "task"):
            (tmp_path / asking).mkdir()
            with pytest.raises(TooMuchError, match="at most 1048576 bytes"):
                ASKING[asking](connection, tmp_path / asking)


@pytest.mark.parametrize("asking", ["task", "fetch", "repository"])
def test_a_server_that_drips_is_given_up(asking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arriving, "GRACE_SECONDS", 0.3)
    with dripping() as connection, pytest.raises(FedparaError, match=r"at least 1000 bytes a second, found [0-9]+ in"):
        ASKING[asking](connection, tmp_path)
    assert not (tmp_path / "file").exists()
    started = time.monotonic()
    with dripping("503 Busy") as connection, pytest.raises(FedparaError, match="found status 503"):
        ASKING["task"](connection, tmp_path)
    assert time.monotonic() - started < 20  # of the 50 in which 1000 bytes are there


def test_a_compressed_answer_fills_no_memory(tmp_path: Path) -> None:
    bomb = answer("200 OK", gzip.compress(bytes(200 << 20)), Content_Encoding="gzip")
    tracemalloc.start()
    try:
        with answering(bomb) as connection:
            for name, call in ASKING.items():
                (tmp_path / name).mkdir()
                assert refusal(lambda call=call, name=name: call(connection, tmp_path / name)) is not None  # type: ignore[misc]
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
