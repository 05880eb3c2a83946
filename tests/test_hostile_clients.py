"""A server and whatever may arrive at its socket: refused or given up, and the next device is answered."""

import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from served import Served, bundle_in, serving

from fedpara_edge.serving import connections


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path / "server", bundle_in(tmp_path), updates=2) as server:
        yield server


def opened(served: Served) -> socket.socket:
    return socket.create_connection((served.running.host, served.running.port), timeout=20)


def answer_to(served: Served, data: bytes) -> bytes:
    """All that comes back before either side ends the connection."""
    found = b""
    with opened(served) as connection, suppress(ConnectionResetError, BrokenPipeError):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while piece := connection.recv(1 << 16):
            found += piece
    return found


HOST = b"Host: x\r\n"
REQUESTS = {
    "no HTTP": b"\x16\x03\x01" + bytes(300),
    "an endless line": b"GET /" + b"a" * 200_000,
    "an endless field": b"GET / HTTP/1.1\r\n" + HOST + b"A: " + b"b" * 200_000,
    "endless fields": b"GET / HTTP/1.1\r\n" + HOST + b"A: b\r\n" * 50_000,
    "two lengths": b"POST /join HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\nContent-Length: 30\r\n\r\nabc",
    "a length and chunks": b"POST /join HTTP/1.1\r\n" + HOST
    + b"Content-Length: 40\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /metrics HTTP/1.1\r\n" + HOST + b"\r\n",
    "an unknown coding": b"POST /join HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "a negative length": b"POST /join HTTP/1.1\r\n" + HOST + b"Content-Length: -1\r\n\r\n",
    "a huge length": b"POST /updates HTTP/1.1\r\n" + HOST + b"Content-Length: " + b"9" * 4000 + b"\r\n\r\n",
    "a bad chunk": b"POST /updates HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "a bare line feed": b"GET / HTTP/1.1\n" + HOST + b"X: y\n\n",
    "a folded field": b"GET / HTTP/1.1\r\n" + HOST + b"A: b\r\n c\r\n\r\n",
    "a field of no ASCII": b"GET /task.json HTTP/1.1\r\n" + HOST + b"Authorization: Bearer \xff\xe9.\xff\r\n\r\n",
    "a path of no UTF-8": b"GET /%ff%fe%00 HTTP/1.1\r\n" + HOST + b"\r\n",
    "another version": b"GET / HTTP/9.9\r\n" + HOST + b"\r\n",
    "a proxy's request": b"GET http://elsewhere/ HTTP/1.1\r\n" + HOST + b"\r\n",
    "a tunnel": b"CONNECT elsewhere:22 HTTP/1.1\r\n" + HOST + b"\r\n",
    "a web socket": b"GET /task.json HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    **{
        f"a way out: {path}": b"GET " + path.encode() + b" HTTP/1.1\r\n" + HOST + b"\r\n"
        for path in ("/../run.json", "/..%2frun.json", "/operator/..%2f..%2frun.json", "/operator/%2e%2e/x",
                     "//etc/passwd", "/files/../run.json", "/%5c..%5crun.json", "/" + "../" * 50 + "etc/passwd")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", REQUESTS)
def test_any_request_is_refused_and_the_next_device_is_answered(
    name: str, served: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = answer_to(served, REQUESTS[name])
    statuses = [int(line.split()[1]) for line in found.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
    assert all(400 <= status < 500 for status in statuses), found
    assert b"fingerprint" not in found
    assert b"root:" not in found
    assert served.member(tmp_path / "ann", "ann").task(wait=False).train
    assert not [event for event in served.events if event[0] == "error"]
    assert not caplog.records


def test_who_says_nothing_keeps_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    with serving(tmp_path / "server", bundle_in(tmp_path), updates=2) as served:
        silent, dripping, patient = opened(served), opened(served), opened(served)
        token = f"Authorization: Bearer {served.member(tmp_path / 'ann', 'ann').connection.token}\r\n"
        dripping.sendall(b"GET / HT")
        patient.sendall(f"GET /task.json HTTP/1.1\r\nHost: x\r\nPrefer: wait=3\r\n{token}\r\n".encode())
        for connection in (silent, dripping):
            with connection, suppress(ConnectionResetError):
                assert connection.recv(1) == b""  # before the timeout of the socket
        with patient:
            assert patient.recv(12) == b"HTTP/1.1 200"
