"""Certificates that a server makes for itself, of an authority of its own.

    ca.pem               certificate of the authority, for devices to trust
    server.pem           certificate of the server for its names and addresses, signed by it
    server-key.pem       its private key

The private key of the authority is thrown away, so that nothing else is ever signed with it.
"""

from __future__ import annotations

import socket
from collections.abc import Collection
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedpara_edge.storage.atomic import replacing_file
from fedpara_edge.storage.wholefile import read_whole

AUTHORITY, CERTIFICATE, KEY = "ca.pem", "server.pem", "server-key.pem"
"""Names of the files."""
DAYS = 365
RENEWED_DAYS = 30
"""Days before the end of a certificate in which it is made anew."""
LOOPBACK = "127.0.0.1"
_PRIVATE = 0o600
_PEM = serialization.Encoding.PEM
_SOMEWHERE = ("192.0.2.1", 9)
"""Address of nobody (RFC 5737), the way to which says which address this machine has; nothing is sent there."""


def make_certificates(folder: Path, names: Collection[str], *, authority: str) -> None:
    """Make an authority and a server's certificate, in place of any that are there.

    Args:
        folder: Folder to write to.
        names: Names and addresses of the server.
        authority: Name of the authority, as people see it.

    Raises:
        FedparaError: The disk refuses a write.
    """
    signing, key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    issuer, subject = _name(authority), _name(min(names, key=len))
    own = x509.SubjectKeyIdentifier.from_public_key(signing.public_key())
    root = (
        _certificate(issuer, signing.public_key(), issuer)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(own, critical=False)
        .sign(signing, hashes.SHA384())
    )
    signed = (
        _certificate(subject, key.public_key(), issuer)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_named(name) for name in sorted(names)]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own), critical=False)
        .sign(signing, hashes.SHA384())
    )
    private = key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write(folder / KEY, private, mode=_PRIVATE)
    _write(folder / CERTIFICATE, signed.public_bytes(_PEM))
    _write(folder / AUTHORITY, root.public_bytes(_PEM))


def keep_certificates(folder: Path, names: Collection[str], *, authority: str) -> bool:
    """Make certificates unless those that are there are good for all of the names for a while; whether it did.

    Raises:
        FedparaError: The disk refuses a write.
    """
    folder.mkdir(exist_ok=True)
    if _are_good(folder, names):
        return False
    make_certificates(folder, names, authority=authority)
    return True


def local_address() -> str:
    """Address of this machine in its network; that of itself alone where it has none."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect(_SOMEWHERE)
        return str(way.getsockname()[0])
    return LOOPBACK


def local_names() -> set[str]:
    """Names and addresses by which devices of the network may know this machine."""
    host = socket.gethostname().partition(".")[0]
    return {"localhost", LOOPBACK, local_address(), *({host, f"{host}.local"} if host.isascii() and host else ())}


def _are_good(folder: Path, names: Collection[str]) -> bool:
    if not all((folder / name).exists() for name in (AUTHORITY, CERTIFICATE, KEY)):
        return False
    try:
        found, root = (x509.load_pem_x509_certificate(read_whole(folder / name)) for name in (CERTIFICATE, AUTHORITY))
        known = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        found.verify_directly_issued_by(root)
        until = min(found.not_valid_after_utc, root.not_valid_after_utc)
    except (ValueError, TypeError, x509.ExtensionNotFound):
        return False
    return until > datetime.now(UTC) + timedelta(days=RENEWED_DAYS) and all(_named(name) in known for name in names)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:64])])


def _named(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _certificate(subject: x509.Name, key: ec.EllipticCurvePublicKey, issuer: x509.Name) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=DAYS))
    )


def _write(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    with replacing_file(path, mode=mode) as temporary:
        temporary.write_bytes(content)
