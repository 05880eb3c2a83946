"""Ports of this machine: free ones to listen at, and whether somebody does."""

from __future__ import annotations

import socket
import time

from fedpara_edge.errors import InputError

LOOPBACK, EVERYWHERE = "127.0.0.1", "0.0.0.0"
"""Addresses to listen at, for this machine alone and for all."""
_RETRY_SECONDS = 0.05


def free_ports(count: int, *, first: int = 0, address: str = LOOPBACK) -> list[int]:
    """Ports that nobody uses.

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
            try:
                listener.bind((address, number))
            except OSError as error:
                raise InputError(f"expected a free port, found {number} in use; choose another", key="port") from error
        return [listener.getsockname()[1] for listener in opened]
    finally:
        for listener in opened:
            listener.close()


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
