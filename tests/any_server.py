"""Servers that answer what they are told to, whatever they are asked."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from device_runtime.agent.connection import Connection


def _hear(client: socket.socket) -> None:
    """Read a request to its end: a connection that is closed with some of it unread is reset, with the answer lost."""
    heard = b""
    while b"\r\n\r\n" not in heard and (piece := client.recv(1 << 16)):
        heard += piece
    head, _, body = heard.partition(b"\r\n\r\n")
    length = re.search(rb"(?im)^content-length: *([0-9]+)", head)
    left = int(length[1]) - len(body) if length else 0
    while left > 0 and (piece := client.recv(1 << 16)):
        left -= len(piece)


@contextmanager
def answering(*answers: bytes) -> Iterator[Connection]:
    """A server that gives these answers, the last one again and again, whatever it is asked."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            for answer in [*answers, *[answers[-1]] * 20]:
                with suppress(OSError):  # who asked has heard enough, or the test is over
                    client, _ = listening.accept()
                    with client:
                        _hear(client)
                        client.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield Connection(f"http://127.0.0.1:{listening.getsockname()[1]}/")
        listening.shutdown(socket.SHUT_RDWR)


def answer(status: str, body: bytes = b"", **fields: str) -> bytes:
    found = {"Content-Length": str(len(body)), **{name.replace("_", "-"): value for name, value in fields.items()}}
    head = "".join(f"{name}: {value}\r\n" for name, value in found.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode("latin-1") + body


@contextmanager
def dripping(status: str = "200 OK") -> Iterator[Connection]:
    """A server that sends a byte every 50 ms."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip(client: socket.socket) -> None:
            with suppress(OSError), client:
                _hear(client)
                client.sendall(f"HTTP/1.1 {status}\r\nContent-Length: 10000\r\n\r\n".encode())
                for _ in range(1000):
                    client.sendall(b"[")
                    time.sleep(0.05)

        def serve() -> None:
            with suppress(OSError):
                while True:
                    threading.Thread(target=drip, args=(listening.accept()[0],), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield Connection(f"http://127.0.0.1:{listening.getsockname()[1]}/")
        listening.shutdown(socket.SHUT_RDWR)
