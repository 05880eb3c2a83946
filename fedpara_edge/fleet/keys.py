"""Keys of a fleet on this machine: a certificate for the SuperLink, and a key for each SuperNode.

    ca.pem               certificate of an authority of our own, which nodes and `flwr` trust
    server.pem           certificate of the SuperLink for the names and addresses of this machine, signed by it
    server-key.pem       its private key
    node-<i>, node-<i>.pub
                         private and public key of a node, as OpenSSH has them; Flower takes keys on NIST's curves alone

The private key of the authority is thrown away, so that nothing else is ever signed with it.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedpara_edge.storage.atomic import replacing_file

DAYS = 365
LOOPBACK = "127.0.0.1"
_PRIVATE = 0o600
_PEM = serialization.Encoding.PEM


def make_server_keys(folder: Path) -> None:
    """Make the certificates of a SuperLink on this machine, in place of any that are there.

    Raises:
        FedparaError: The disk refuses a write.
    """
    authority, server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    issuer, subject = _name("fedpara-edge fleet"), _name("localhost")
    names = [x509.DNSName("localhost"), x509.IPAddress(ip_address(LOOPBACK))]
    root = (
        _certificate(issuer, authority.public_key(), issuer)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(authority, hashes.SHA384())
    )
    signed = (
        _certificate(subject, server.public_key(), issuer)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(authority, hashes.SHA384())
    )
    _write(folder / "ca.pem", root.public_bytes(_PEM))
    _write(folder / "server.pem", signed.public_bytes(_PEM))
    _write(folder / "server-key.pem", _private(server, serialization.PrivateFormat.PKCS8), mode=_PRIVATE)


def make_node_key(path: Path) -> Path:
    """Make the key of a node, unless it is there; path of its public key.

    Raises:
        FedparaError: The disk refuses a write.
    """
    public = path.with_name(f"{path.name}.pub")
    if not (path.exists() and public.exists()):
        key = ec.generate_private_key(ec.SECP384R1())
        content = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        _write(path, _private(key, serialization.PrivateFormat.OpenSSH), mode=_PRIVATE)
        _write(public, content + b"\n")
    return public


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


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


def _private(key: ec.EllipticCurvePrivateKey, kind: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(_PEM, kind, serialization.NoEncryption())


def _write(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    with replacing_file(path, mode=mode) as temporary:
        temporary.write_bytes(content)
