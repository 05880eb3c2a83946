"""What a request says: its body, piece by piece, the fields of uploads in pieces and of waiting, and who joins."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request

from fedpara_edge.formats.update import is_valid_client_name
from fedpara_edge.serving.refused import RefusedError
from fedpara_edge.storage.tensortable import strict_json

MAX_WAIT_SECONDS = 60.0
"""Longest time for which a request for a task may wait."""
PIECE_SECONDS = 60.0
"""Time for the next bytes of a body, after which the connection is given up."""
_COMPLETE = {"?1": True, "?0": False}


async def pieces(request: Request) -> AsyncIterator[bytes]:
    """The body of a request, piece by piece.

    Raises:
        TimeoutError: The next one takes too long.
        ClientDisconnect: The connection broke.
    """
    stream = aiter(request.stream())
    while True:
        try:
            piece = await asyncio.wait_for(anext(stream), PIECE_SECONDS)
        except StopAsyncIteration:
            return
        if piece:
            yield piece


def is_complete(request: Request, *, default: bool) -> bool:
    """Whether a body is the last of an upload, by the field Upload-Complete.

    Raises:
        RefusedError: The field says something else.
    """
    found = request.headers.get("Upload-Complete")
    if found is None:
        return default
    if found not in _COMPLETE:
        raise RefusedError("expected the field Upload-Complete as ?0 or ?1, found something else", status=400)
    return _COMPLETE[found]


def number_in(request: Request, name: str, default: int | None) -> int | None:
    """A field that is a number, or the default where it is missing.

    Raises:
        RefusedError: It is no number.
    """
    found = request.headers.get(name)
    if found is None:
        return default
    if not (found.isascii() and found.isdecimal() and len(found) <= 18):
        raise RefusedError(f"expected a number in the field {name}, found something else", status=400)
    return int(found)


def read_envelope(request: Request) -> bytes | None:
    """The signature that comes with an update, of its field Update-Envelope in base64; None without.

    Raises:
        RefusedError: The field is something else.
    """
    try:
        found = request.headers.get("Update-Envelope")
        return None if found is None else base64.b64decode(found, validate=True)
    except ValueError as error:
        raise RefusedError("expected the field Update-Envelope in base64, found something else", status=400) from error


def wait_seconds(preference: str) -> float:
    """Time for which a request may wait, of its field Prefer."""
    for part in preference.split(","):
        name, _, value = part.partition("=")
        if name.strip().lower() == "wait" and value.strip().isdecimal():
            return min(float(value.strip()[:6]), MAX_WAIT_SECONDS)
    return 0.0


def read_join(body: bytes) -> tuple[str, str]:
    """The name of a device that joins, made of its secret where it has none, and the SHA-256 of that secret.

    Raises:
        RefusedError: The request says neither.
    """
    try:
        found: Any = strict_json(body.decode("utf-8"))
        client, secret = found.get("client"), found["secret"]
        if not isinstance(secret, str) or len(secret) < 32:
            raise ValueError("no secret of at least 32 characters")
        if client is None:
            client = hashlib.sha256(f"name {secret}".encode()).hexdigest()[:16]
        if not isinstance(client, str) or not is_valid_client_name(client):
            raise ValueError("a client without a printable name")
    except (AttributeError, KeyError, UnicodeDecodeError, ValueError) as error:
        raise RefusedError(
            f"expected JSON with client and secret, found {json.dumps(str(error))}", status=400
        ) from error
    return client, hashlib.sha256(secret.encode()).hexdigest()
