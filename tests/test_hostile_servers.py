"""A device and what any server may answer: a `FedparaError` of one line, a bounded wait, and nothing left behind."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import signed
from small_round import send as write_update
from small_round import start_round

from device_runtime.agent import transfers
from device_runtime.agent.connection import LONGEST_WAIT_SECONDS, Connection, UnreachableError
from device_runtime.agent.link import JoinLink
from device_runtime.agent.member import Member
from device_runtime.agent.transfers import fetch, send
from fedpara_edge.errors import FedparaError
from fedpara_edge.trust.client import receive

DIGEST = "a" * 64


@contextmanager
def answering(*answers: bytes) -> Iterator[Connection]:
    """A server that gives these answers, the last one again and again, whatever it is asked."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            for answer in [*answers, *[answers[-1]] * 20]:
                with suppress(OSError):  # who asked has heard enough, or the test is over
                    client, _ = listening.accept()
                    with client:
                        client.recv(1 << 16)
                        client.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield Connection(f"http://127.0.0.1:{listening.getsockname()[1]}/")
        listening.shutdown(socket.SHUT_RDWR)


def answer(status: str, body: bytes = b"", **fields: str) -> bytes:
    found = {"Content-Length": str(len(body)), **{name.replace("_", "-"): value for name, value in fields.items()}}
    head = "".join(f"{name}: {value}\r\n" for name, value in found.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode("latin-1") + body


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


def test_a_file_without_end_fills_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "MAX_FILE_BYTES", 1 << 20)
    body = b"HTTP/1.1 200 OK\r\n\r\n" + bytes(4 << 20)
    with answering(body) as connection, pytest.raises(FedparaError, match="at most 1048576 bytes") as caught:
        fetch(connection, f"files/{DIGEST}", tmp_path / "file", DIGEST)
    assert not isinstance(caught.value, UnreachableError)
    assert list(tmp_path.iterdir()) == []
