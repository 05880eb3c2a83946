"""Tokens: what joins a federation, what a device proves itself with, and what opens the operator's page.

A token is `<kind>.<subject>.<expiry>.<signature>`: subject and signature in base64 without padding (RFC 4648, section
5), the expiry in whole seconds since 1970 or empty, and the signature an HMAC-SHA256 of the three parts before it. The
key lies in the server's state folder, so that tokens outlive the process, and nothing has to be kept of them.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import secrets
from pathlib import Path
from typing import Literal

from fedpara_edge.errors import InputError
from fedpara_edge.storage.atomic import replacing_file
from fedpara_edge.storage.wholefile import read_whole

Kind = Literal["join", "device", "operator"]
KEY = "key"
"""Name of the key's file in a state folder."""
_KEY_BYTES = 32
_MAX_CHARACTERS = 2000


class Tokens:
    """Tokens under one key.

    Args:
        key: Secret key.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def make(self, kind: Kind, subject: str = "", *, expires: float | None = None) -> str:
        """A token.

        Args:
            kind: Kind of the token.
            subject: Name of whom it is for.
            expires: Time in seconds since 1970 from which on it is void; None for never.
        """
        content = f"{kind}.{_encoded(subject.encode())}.{'' if expires is None else int(expires)}"
        return f"{content}.{self._signature(content)}"

    def subject(self, kind: Kind, token: str, *, now: float) -> str | None:
        """The subject of a token; None if it is forged, void or of another kind.

        >>> tokens = Tokens(b"secret")
        >>> tokens.subject("join", tokens.make("join", "ann", expires=60), now=59)
        'ann'
        >>> tokens.subject("join", tokens.make("join", "ann", expires=60), now=60)
        >>> tokens.subject("device", tokens.make("join", "ann"), now=0)
        """
        content, _, signature = token.rpartition(".")
        if len(token) > _MAX_CHARACTERS or not token.isascii():
            return None
        if not hmac.compare_digest(signature, self._signature(content)):
            return None
        found, encoded, expires = content.split(".")
        if found != kind or (expires and now >= int(expires)):
            return None
        return _decoded(encoded)

    def _signature(self, content: str) -> str:
        return _encoded(hmac.digest(self._key, content.encode(), hashlib.sha256))


def open_tokens(folder: Path, *, make: bool = False) -> Tokens:
    """The tokens of a server's state folder.

    Args:
        folder: State folder.
        make: Whether a key is made if there is none; a server that runs would not know it.

    Raises:
        InputError: The key can't be read, or is damaged.
        FedparaError: The disk refuses the write.
    """
    path = folder / KEY
    if make and not path.exists():
        with replacing_file(path, mode=0o600) as temporary:
            temporary.write_bytes(secrets.token_bytes(_KEY_BYTES))
    try:
        key = read_whole(path)
    except OSError as error:
        raise InputError(f"{path}: expected the key of the tokens, found {error.strerror}; check the path") from error
    if len(key) != _KEY_BYTES:
        raise InputError(
            f"{path}: expected a key of {_KEY_BYTES} bytes, found {len(key)}; delete it, and all devices have to join "
            "again"
        )
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise InputError(
            f"{path}: expected a key that its owner alone can read, found others can; type: chmod 600 {path}"
        )
    return Tokens(key)


def _encoded(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


def _decoded(text: str) -> str | None:
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode()
    except (binascii.Error, UnicodeDecodeError):
        return None
