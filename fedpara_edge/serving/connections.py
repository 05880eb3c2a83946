"""Connections that are given up if no request begins on them for too long.

uvicorn waits for the first request of a connection, and for the rest of a request's head, without end: so whoever opens
connections and says nothing, or a byte now and then, would have all that the system allows ("Slowloris").
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 75.0
"""Time in which a request has to begin, on a new connection and after each answer; twice that in the worst case."""


class Connection(H11Protocol):
    """A connection of uvicorn's."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to look after a connection."""
        super().connection_made(transport)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """Look after it no more."""
        super().connection_lost(exc)
        self._looking.cancel()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP; if it is the rest of a request, end that, which may have been answered."""
        if self.cycle is None or self.cycle.response_complete:
            super().send_400_response(msg)
        else:
            self.transport.abort()

    def _look(self) -> None:
        self._looking = self.loop.call_later(HEAD_SECONDS, self._give_up, self.cycle)

    def _give_up(self, before: Any) -> None:
        """Give it up if it has had no other request since, and that is answered."""
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and self.cycle is before:
            self.transport.abort()
        else:
            self._look()
