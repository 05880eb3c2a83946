"""Updates that are still arriving, in pieces, over connections that may break.

    uploads/<id>/upload.json   {"client", "length"}: who sends it, and how many bytes it will have (null: not said)
    uploads/<id>/update        what arrived so far, in order from the first byte

The size of the file is the offset at which the sender goes on, so that nothing else has to be written with each piece,
and a server that was killed knows it again. A piece of an older connection is dropped as soon as a newer one has begun:
of two senders with one upload, as of a device that lost its connection and came back, the last one goes on.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedpara_edge.errors import FedparaError
from fedpara_edge.serving.refused import RefusedError
from fedpara_edge.storage.atomic import replacing_file
from fedpara_edge.storage.tensortable import strict_json
from fedpara_edge.storage.wholefile import read_text

_ID = re.compile(r"[0-9a-f]{32}")
_META, _CONTENT = "upload.json", "update"
IDLE_SECONDS = 24 * 3600.0
"""Time without a piece after which an upload is forgotten."""


@dataclass(frozen=True)
class Upload:
    """An upload that was begun.

    Args:
        folder: Folder of the upload.
        client: Device that sends it.
        length: Number of bytes that it will have; None if that was not said.
    """

    folder: Path
    client: str
    length: int | None

    @property
    def id(self) -> str:
        """Name by which it is found again."""
        return self.folder.name

    @property
    def content(self) -> Path:
        """File with what arrived."""
        return self.folder / _CONTENT

    @property
    def offset(self) -> int:
        """Number of bytes that arrived."""
        return self.content.stat().st_size


class Uploads:
    """The uploads in a folder; a device has at most one.

    Args:
        folder: The folder.
        max_bytes: Most bytes of one.
    """

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self._folder = folder
        self.max_bytes = max_bytes
        self._writers: dict[str, object] = {}
        self._of_client: dict[str, str] = {}
        for entry in sorted(folder.iterdir()):
            upload = self._read(entry)
            if upload is None or time.time() - upload.content.stat().st_mtime > IDLE_SECONDS:
                shutil.rmtree(entry, ignore_errors=True)
            else:
                self._of_client[upload.client] = upload.id

    def begin(self, client: str, length: int | None) -> Upload:
        """Begin an upload, in place of one of the same device that was not completed.

        Raises:
            RefusedError: It would be too long.
            FedparaError: The disk refuses the write.
        """
        self.check_length(length)
        if (former := self._of_client.get(client)) is not None:
            self.remove(former)
        upload = Upload(self._folder / secrets.token_hex(16), client, length)
        try:
            upload.folder.mkdir()
            upload.content.touch()
            with replacing_file(upload.folder / _META) as temporary:
                temporary.write_text(json.dumps({"client": client, "length": length}), encoding="utf-8")
        except OSError as error:
            raise _refused(error) from error
        self._of_client[client] = upload.id
        return upload

    def find(self, name: str, client: str) -> Upload:
        """The upload of that name.

        Raises:
            RefusedError: There is none of this device.
        """
        upload = self._read(self._folder / name) if _ID.fullmatch(name) else None
        if upload is None or upload.client != client:
            raise RefusedError("expected an upload that was begun, found none; begin it again", status=404)
        return upload

    def take_over(self, upload: Upload, offset: int) -> object:
        """Become the one writer of an upload; the pass for `append`.

        Raises:
            RefusedError: The sender goes on at another byte than the next one.
        """
        if offset != upload.offset:
            raise RefusedError(f"expected to go on at byte {upload.offset}, found byte {offset}", status=409)
        writer = self._writers[upload.id] = object()
        return writer

    def append(self, upload: Upload, writer: object, piece: bytes) -> None:
        """Add a piece.

        Raises:
            RefusedError: Another sender has taken over, or the upload gets too long.
            FedparaError: The disk refuses the write.
        """
        if self._writers.get(upload.id) is not writer:
            raise RefusedError("expected one sender, found another that goes on", status=409)
        try:
            total = upload.offset + len(piece)
            self.check_length(total)
            if upload.length is not None and total > upload.length:
                raise RefusedError(f"expected {upload.length} bytes, as was said, found more", status=400)
            with upload.content.open("ab") as file:
                file.write(piece)
        except OSError as error:
            raise _refused(error) from error

    def check_complete(self, upload: Upload) -> None:
        """Refuse an upload whose sender has ended early or late.

        Raises:
            RefusedError: It has another length than was said.
        """
        if upload.length is not None and upload.offset != upload.length:
            raise RefusedError(f"expected {upload.length} bytes, as was said, found {upload.offset}", status=400)

    def check_length(self, length: int | None) -> None:
        """Refuse a length that no update of the model has.

        Raises:
            RefusedError: It is too long.
        """
        if length is not None and length > self.max_bytes:
            raise RefusedError(
                f"expected at most {self.max_bytes} bytes, as updates of this model have, found {length}", status=413
            )

    def remove(self, name: str) -> None:
        """Forget an upload."""
        self._writers.pop(name, None)
        self._of_client = {client: other for client, other in self._of_client.items() if other != name}
        shutil.rmtree(self._folder / name, ignore_errors=True)

    def _read(self, folder: Path) -> Upload | None:
        with suppress(KeyError, OSError, TypeError, ValueError):
            found = strict_json(read_text(folder / _META))
            client, length = found["client"], found["length"]
            if isinstance(client, str) and (length is None or type(length) is int) and (folder / _CONTENT).is_file():
                return Upload(folder, client, length)
        return None


def _refused(error: OSError) -> FedparaError:
    return FedparaError(f"upload: expected to write it, found {error.strerror or error}; send it again later")
