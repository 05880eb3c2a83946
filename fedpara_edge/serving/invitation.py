"""What is shown to those who are to join: a link, and the same as a QR code for a terminal."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import segno

from fedpara_edge.errors import InputError
from fedpara_edge.serving.tokens import open_tokens
from fedpara_edge.storage.atomic import replacing_file
from fedpara_edge.storage.tensortable import strict_json
from fedpara_edge.storage.wholefile import read_text, read_whole

FILE = "address.json"
"""Name of the file in a state folder that says where its server is."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a server is, as it last ran.

    Args:
        url: Address under which devices reach it.
        ca: SHA-256 of the certificate that vouches for it, hexadecimal; None for those of the system.
    """

    url: str
    ca: str | None

    def link(self, token: str, *, kind: str = "join", place: str = "") -> str:
        """A link with a token, which comes after # so that no request has it.

        >>> Address(url="https://pi.local/", ca=None).link("abc")
        'https://pi.local/#join=abc'
        """
        ca = "" if self.ca is None or kind != "join" else f"&ca={self.ca}"
        return f"{self.url.rstrip('/')}/{place}#{kind}={token}{ca}"


def keep_address(folder: Path, url: str, authority: Path | None) -> Address:
    """Write where a server is into its state folder.

    Args:
        folder: State folder.
        url: Address under which devices reach it.
        authority: Certificate that vouches for it, PEM; None for those of the system.

    Raises:
        FedparaError: The disk refuses the write.
    """
    ca = None if authority is None else hashlib.sha256(read_whole(authority)).hexdigest()
    address = Address(url=url, ca=ca)
    with replacing_file(folder / FILE) as temporary:
        temporary.write_text(json.dumps(asdict(address)) + "\n", encoding="utf-8")
    return address


def invite(folder: Path, *, now: float, hours: float) -> str:
    """A new join link of a server's state folder, whether it runs or not.

    Raises:
        InputError: The folder is none, or no server has run on it yet.
    """
    return read_address(folder).link(open_tokens(folder).make("join", expires=now + 3600 * hours))


def operator_link(folder: Path, *, now: float, hours: float) -> str:
    """A link to the operator's page of a server's state folder.

    Raises:
        InputError: The folder is none, or no server has run on it yet.
    """
    address, tokens = read_address(folder), open_tokens(folder)
    return address.link(tokens.make("operator", expires=now + 3600 * hours), kind="operator", place="operator")


def read_address(folder: Path) -> Address:
    """Where the server of a state folder is.

    Raises:
        InputError: No server has run on it yet, or the file is damaged.
    """
    path = folder / FILE
    try:
        found = strict_json(read_text(path))
        address = Address(url=found["url"], ca=found["ca"])
        if not isinstance(address.url, str) or not isinstance(address.ca, str | None):
            raise TypeError("no address")
        return address
    except OSError as error:
        raise InputError(
            f"{path}: expected where the server is, found {error.strerror}; start `serve` on this folder"
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: expected where the server is, found {error}; start `serve` on this folder"
        ) from error


def qr_code(text: str) -> str:
    """A text as a QR code of block characters, for a terminal."""
    drawn = io.StringIO()
    segno.make(text, error="l", micro=False).terminal(drawn, border=2, compact=True)
    return drawn.getvalue()
