"""Transfers that go on where they stopped: files of the server by ranges, updates in pieces.

An update is sent as `fedpara_edge.serving.application` takes it, in the IETF's way of resumable uploads. Where it is
being sent to is kept beside it, so that an agent that was killed goes on as well.
"""

from __future__ import annotations

import base64
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from device_runtime.agent.connection import Answer, Connection, UnreachableError, pieces
from fedpara_edge.errors import FedparaError, InvalidUpdateError
from fedpara_edge.storage.arriving import TooMuchError
from fedpara_edge.storage.atomic import replacing_file, sha256_of, sync
from fedpara_edge.storage.tensortable import strict_json
from fedpara_edge.storage.wholefile import read_text, read_whole

PARTIAL = "application/partial-upload"
MAX_FILE_BYTES = (1 << 31) - 1
"""Largest file that is fetched, that of the largest graph."""


class MissingError(FedparaError):
    """A file is no longer on the server, as its round is over: exit code 1."""

    code = "missing"


def fetch(connection: Connection, place: str, target: Path, digest: str, *, max_bytes: int = MAX_FILE_BYTES) -> int:
    """Fetch a file whose SHA-256 is known, unless it is there; the number of bytes that were received.

    Args:
        connection: Way to the server.
        place: Address of the file.
        target: File to write; what arrived of it so far is beside it, with `.part`.
        digest: SHA-256, hexadecimal.
        max_bytes: Largest size that it may have.

    Raises:
        UnreachableError: The connection broke, or is too slow; the same call goes on.
        MissingError: The server does not have it.
        TooMuchError: It is larger; what arrived is removed.
        FedparaError: The server sends something else.
    """
    if target.exists() and sha256_of(target) == digest:
        return 0
    part = target.with_name(f"{target.name}.part")
    begun = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={begun}-", "If-Range": f'"{place.rpartition("/")[2]}"'} if begun else {}
    received = 0
    with connection.asking("GET", place, headers=headers) as response:
        if response.status in (401, 404):
            raise MissingError(f"{connection.url}{place}: expected a file, found none; get the task again")
        if response.status == 416:
            part.unlink(missing_ok=True)
            raise UnreachableError(f"{connection.url}{place}: expected the rest of a file, found none; begin it again")
        if response.status not in (200, 206):
            raise FedparaError(f"{connection.url}{place}: expected a file, found status {response.status}")
        with part.open("ab" if response.status == 206 else "wb") as file:
            try:
                for piece in pieces(response, name=f"{connection.url}{place}", max_bytes=max_bytes - file.tell()):
                    received += file.write(piece)
            except TooMuchError:
                part.unlink()
                raise
    if sha256_of(part) != digest:
        is_short = response.length not in (0, None)
        if not is_short:
            part.unlink()
        raise UnreachableError(f"{connection.url}{place}: expected its content whole, found another; fetch it again")
    sync(part)
    part.replace(target)
    return received


def send(connection: Connection, place: str, update: Path) -> bool:
    """Send an update, from where an earlier call stopped; whether it was not there before.

    Args:
        connection: Way to the server.
        place: Address that takes updates.
        update: Update file.

    Raises:
        UnreachableError: The connection broke, or the server asks for patience; the same call goes on.
        InvalidUpdateError: The server refuses it.
    """
    note, size = update.with_name(f"{update.name}.json"), update.stat().st_size
    digest = sha256_of(update)
    location, offset = _find(connection, note, digest, size)
    if location is None:
        headers = {"Upload-Complete": "?0", "Upload-Length": str(size), "Content-Length": "0"}
        begun = connection.request("POST", place, headers=headers, body=b"")
        location, offset = begun.headers.get("location", ""), 0
        if begun.status != 201 or not _is_place(location):
            raise _refused(begun)
        with replacing_file(note) as temporary:
            temporary.write_text(json.dumps({"sha256": digest, "location": location}), encoding="utf-8")
    with update.open("rb") as file:
        file.seek(offset)
        headers = {
            "Content-Type": PARTIAL,
            "Content-Length": str(size - offset),
            "Upload-Offset": str(offset),
            "Upload-Complete": "?1",
            **_signature(update),
        }
        answer = connection.request("PATCH", location, headers=headers, body=file)
    if answer.status in (200, 201):
        return answer.status == 201
    if answer.status == 404 or "upload-offset" in answer.headers:
        raise UnreachableError(f"{connection.url}: expected to go on sending, found {answer.sentence}; try again")
    raise _refused(answer)


def forget(update: Path) -> None:
    """Remove an update that was taken or refused."""
    for beside in (update.with_name(f"{update.name}.json"), _envelope(update)):
        beside.unlink(missing_ok=True)
    update.unlink(missing_ok=True)


def _envelope(update: Path) -> Path:
    """File of the signature of an update (`fedpara_edge.trust.envelope`)."""
    return update.with_name(f"{update.name}.dsse")


def _signature(update: Path) -> dict[str, str]:
    """The field with the signature of an update, if it is signed."""
    envelope = _envelope(update)
    if not envelope.exists():
        return {}
    return {"Update-Envelope": base64.b64encode(read_whole(envelope)).decode()}


def _find(connection: Connection, note: Path, digest: str, size: int) -> tuple[str | None, int]:
    """Address of an upload that was begun, and how much of it is there; None if there is none."""
    location = read_location(note, digest)
    if location is not None:
        found = connection.request("HEAD", location)
        offset = found.headers.get("upload-offset", "")
        if found.status == 204 and offset.isdecimal() and len(offset) <= len(str(size)) and int(offset) <= size:
            return location, int(offset)
    return None, 0


def read_location(note: Path, digest: str) -> str | None:
    """Address to which an update of that SHA-256 was being sent; None if it was to none."""
    with suppress(KeyError, OSError, TypeError, ValueError):
        kept = strict_json(read_text(note))
        location = kept["location"]
        if kept["sha256"] == digest and _is_place(location):
            return str(location)
    return None


def _is_place(found: Any) -> bool:
    """Whether something is an address below that of the server, as a request may have it."""
    return isinstance(found, str) and found.isascii() and found.isprintable() and found != ""


def _refused(answer: Answer) -> InvalidUpdateError:
    status = answer.status
    code = {401: "not_joined"}.get(status, "refused")
    return InvalidUpdateError(f"the server: {answer.sentence} (status {status})", code=code)
