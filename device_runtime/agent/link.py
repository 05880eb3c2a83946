"""The join link: where a server is, and what lets a device in.

    https://host:8443/#join=<token>&ca=<SHA-256>

What comes after `#` is not sent with requests, so no log has it. `ca` is the SHA-256 of the certificate with which a
server for the local network signs its own, PEM at `ca.pem`: with it, nothing else vouches for the server.
"""

from __future__ import annotations

import hashlib
import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urldefrag

from device_runtime.agent.connection import Connection
from fedpara_edge.errors import InputError, TrustError
from fedpara_edge.storage.atomic import replacing_file
from fedpara_edge.storage.wholefile import MAX_BYTES, check_regular, read_whole

_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class JoinLink:
    """A join link.

    Args:
        url: Address of the server.
        token: Token that lets a device in; None for one that has joined before.
        ca: SHA-256 of the certificate that vouches for the server, hexadecimal; None for those of the system.
    """

    url: str
    token: str | None = None
    ca: str | None = None


def read_link(text: str) -> JoinLink:
    """The join link that a user gives.

    Raises:
        InputError: The digest in it is none.

    >>> read_link("http://host:8080/#join=abc").token
    'abc'
    """
    url, fragment = urldefrag(text.strip())
    found = {name: values[0] for name, values in parse_qs(fragment).items()}
    ca = found.get("ca")
    if ca is not None and not _SHA256.fullmatch(ca):
        raise InputError(f"{url}: expected a SHA-256 after ca=, found another text; copy the whole join link")
    return JoinLink(url=url, token=found.get("join"), ca=ca)


def connect(link: JoinLink, ca: Path | None, folder: Path) -> Connection:
    """A way to the server of a link.

    Args:
        link: Join link.
        ca: File with certificates that vouch for the server, PEM; None for the link's or the system's.
        folder: Folder in which the link's is kept once it was fetched.

    Raises:
        InputError: The address is none, or the certificates can't be read.
        TrustError: The server's certificate is another than the link says.
        UnreachableError: The server gives no answer.
    """
    kept = folder / "ca.pem"
    if ca is None and link.ca is not None:
        _fetch_ca(link, kept)
    found = ca or (kept if kept.exists() else None)
    if found is None:
        return Connection(link.url)
    try:
        check_regular(found, max_bytes=MAX_BYTES)
        return Connection(link.url, context=ssl.create_default_context(cafile=str(found)))
    except (OSError, ssl.SSLError) as error:
        raise InputError(
            f"{found}: expected certificates in PEM, found {error.strerror or error}; check the file"
        ) from error


def _fetch_ca(link: JoinLink, kept: Path) -> None:
    """Fetch the certificate that the link vouches for, unless it is there."""
    if kept.exists() and hashlib.sha256(read_whole(kept)).hexdigest() == link.ca:
        return
    unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    content = Connection(link.url, context=unverified).request("GET", "ca.pem").content
    if hashlib.sha256(content).hexdigest() != link.ca:
        raise TrustError(
            f"{link.url}: expected the certificate that the join link names, found another: this is another server, or "
            "somebody is in between; ask for a new join link"
        )
    with replacing_file(kept) as temporary:
        temporary.write_bytes(content)
