"""Keys of the SuperNodes of a fleet on this machine.

    node-<i>, node-<i>.pub
                         private and public key of a node, as OpenSSH has them; Flower takes keys on NIST's curves alone

Beside them are the certificates of the SuperLink (`fedpara_edge.serving.certificates`).
"""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedpara_edge.storage.atomic import replacing_file

_PRIVATE = 0o600
_PEM = serialization.Encoding.PEM


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


def _private(key: ec.EllipticCurvePrivateKey, kind: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(_PEM, kind, serialization.NoEncryption())


def _write(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    with replacing_file(path, mode=mode) as temporary:
        temporary.write_bytes(content)
