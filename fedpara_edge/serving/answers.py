"""Answers of a server: refusals in a sentence, and files that can be kept, in ranges, whose bytes are counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.types import Message, Receive, Scope, Send

from fedpara_edge.serving.page import POLICY

HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
"""Fields of every answer."""
RETRY_SECONDS = 2


def refused(message: str, status: int, headers: dict[str, str] | None = None) -> Response:
    """A refusal in a sentence."""
    more = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    if status in (429, 503):
        more["Retry-After"] = str(RETRY_SECONDS)
    if status in (408, 413):
        more["Connection"] = "close"  # the rest of the body is not read
    return PlainTextResponse(f"{message}\n", status, {**more, **HEADERS, **(headers or {})})


def of_file(
    request: Request,
    path: Path,
    *,
    digest: str,
    caching: str,
    media_type: str,
    on_sent: Callable[[int], None] | None = None,
) -> Response:
    """A file, unless who asks has it.

    Args:
        request: Request.
        path: File.
        digest: Name of the content, for caches.
        caching: Value of the field Cache-Control.
        media_type: Type of the content.
        on_sent: Function that is told how many bytes were sent, once the answer ended.
    """
    headers = {"ETag": f'"{digest}"', "Cache-Control": caching}
    if request.headers.get("If-None-Match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return _CountedFile(path, headers=headers, media_type=media_type, on_sent=on_sent)


class _CountedFile(FileResponse):
    """A file of which somebody may be told how much was sent."""

    def __init__(
        self, path: Path, *, headers: dict[str, str], media_type: str, on_sent: Callable[[int], None] | None
    ) -> None:
        super().__init__(path, headers=headers, media_type=media_type)
        self._on_sent = on_sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        sent = 0

        async def counting(message: Message) -> None:
            nonlocal sent
            await send(message)
            sent += len(message.get("body", b""))

        try:
            await super().__call__(scope, receive, counting)
        finally:
            if self._on_sent is not None:
                self._on_sent(sent)
