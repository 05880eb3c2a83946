"""Ports of this machine: free ones to listen at, and whether somebody does."""

from __future__ import annotations

import random
import socket
import time
from contextlib import suppress
from pathlib import Path

from fedpara_edge.errors import InputError

LOOPBACK, EVERYWHERE = "127.0.0.1", "0.0.0.0"
"""Addresses to listen at, for this machine alone and for all."""
_RETRY_SECONDS = 0.05
_EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""Linux's first and last port of outgoing connections."""
_LOWEST, _USUAL_EPHEMERAL = 10_000, 32_768
_TRIES = 100


def free_ports(count: int, *, first: int = 0, address: str = LOOPBACK) -> list[int]:
    """Ports that nobody uses.

    They lie below those that the system gives to outgoing connections: one of these could take a port before its server
    listens there, and a client that tries again and again may even get it for itself and be connected with itself.

    Args:
        count: Number of ports.
        first: The first of them; 0 for any.
        address: Address to listen at.

    Raises:
        InputError: The first is in use.
    """
    opened: list[socket.socket] = []
    try:
        for number in [first, *[0] * (count - 1)]:
            listener = socket.socket()
            opened.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if number == 0:
                _bind_any(listener, address)
                continue
            try:
                listener.bind((address, number))
            except OSError as error:
                raise InputError(f"expected a free port, found {number} in use; choose another", key="port") from error
        return [listener.getsockname()[1] for listener in opened]
    finally:
        for listener in opened:
            listener.close()


def _bind_any(listener: socket.socket, address: str) -> None:
    end = _USUAL_EPHEMERAL
    with suppress(OSError, ValueError):
        end = int(_EPHEMERAL_RANGE.read_text().split()[0])
    for _ in range(_TRIES if end > _LOWEST else 0):
        with suppress(OSError):
            listener.bind((address, random.randrange(_LOWEST, end)))
            return
    listener.bind((address, 0))


def answers(port: int, *, host: str = LOOPBACK, seconds: float = 0.0) -> bool:
    """Whether something listens at a port, by the end of some time."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((host, port), timeout=1):
                return True
        except OSError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_RETRY_SECONDS)
