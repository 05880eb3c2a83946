"""Ed25519 keys in files: private ones as PKCS#8 in PEM that only their owner can read, public ones as one line of text.

FILE        -----BEGIN PRIVATE KEY----- …    mode 0600
FILE.pub    ed25519:<64 hexadecimal digits>
"""

from __future__ import annotations

import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import InternalError, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner, Key, SSlibKey

from fedpara_edge.errors import InputError, brief
from fedpara_edge.storage.atomic import check_output, remove_leftovers, replacing_file
from fedpara_edge.storage.wholefile import read_whole

PUBLIC_SUFFIX = ".pub"
_SCHEME = "ed25519"
_PRIVATE_BEGINS = b"-----BEGIN"
_MAX_BYTES = 4096


def new_keys(paths: Sequence[Path], *, overwrite: bool = False) -> dict[Path, str]:
    """Make key pairs as `new_key` does; those that are there stay if others are missing, as after a kill.

    Returns:
        The public keys as text, by path.

    Raises:
        OutputExistsError: All are there, and `overwrite` is false.
        InputError, FedparaError: As of `new_key`.
    """
    for path in paths:
        remove_leftovers(path)
        remove_leftovers(public_path(path))
    there = [] if overwrite else [path for path in paths if path.exists() and public_path(path).exists()]
    kept = {path: public_text(read_public(path)) for path in there} if len(there) < len(paths) else {}
    return {path: kept.get(path) or new_key(path, overwrite=overwrite) for path in paths}


def new_key(path: Path, *, overwrite: bool = False) -> str:
    """Make a key pair, in a private file and a public one beside it; return the public key as text.

    A private key without its public one, as a kill between the two leaves it, gets that.

    Raises:
        OutputExistsError: One of the files exists, and `overwrite` is false.
        InputError: The files can't be written there.
        FedparaError: The disk refuses a write.
    """
    is_half = not overwrite and path.is_file() and not public_path(path).exists() and is_private(path)
    for output in (path, public_path(path)):
        check_output(output, overwrite=overwrite or is_half)
    signer = read_signer(path) if is_half else CryptoSigner.generate_ed25519()
    if not is_half:
        with replacing_file(path, overwrite=overwrite, mode=0o600) as temporary:
            temporary.write_bytes(signer.private_bytes)
    public = public_text(signer.public_key)
    with replacing_file(public_path(path), overwrite=overwrite) as temporary:
        temporary.write_text(public + "\n", encoding="ascii")
    return public


def public_path(path: Path) -> Path:
    """Path of the public key beside a private one."""
    return path.with_name(path.name + PUBLIC_SUFFIX)


def read_signer(path: Path) -> CryptoSigner:
    """The private key in a file, ready to sign.

    Raises:
        InputError: The file can't be read, others than its owner can read or change it, or it is no Ed25519 key.
    """
    return _signer_of(path, _read(path))


def read_public(path: Path) -> Key:
    """The public key in a file, or that of the private key in it.

    Raises:
        InputError: The file can't be read or is no key, or it is a private one that others can read.
    """
    data = _read(path)
    if data.startswith(_PRIVATE_BEGINS):
        return _signer_of(path, data).public_key
    try:
        return parse_public(data.decode().strip())
    except (InputError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a key file, found {brief(data[:80])}; make one with keys new") from error


def is_private(path: Path) -> bool:
    """Whether a file is a private key.

    Raises:
        InputError: The file can't be read.
    """
    return _read(path).startswith(_PRIVATE_BEGINS)


def parse_public(text: str) -> Key:
    """The public key that a line of text stands for.

    Raises:
        InputError: The text is no Ed25519 key.
    """
    scheme, _, digits = text.partition(":")
    try:
        if scheme != _SCHEME:
            raise ValueError
        return SSlibKey.from_crypto(Ed25519PublicKey.from_public_bytes(bytes.fromhex(digits)))
    except ValueError as error:
        raise InputError(f"expected {_SCHEME}:<64 hexadecimal digits>, found {brief(text)}") from error


def public_text(key: Key) -> str:
    """A public key as one line of text."""
    return f"{_SCHEME}:{key.keyval['public']}"


def _signer_of(path: Path, data: bytes) -> CryptoSigner:
    mode = stat.S_IMODE(path.stat().st_mode)
    if sys.platform != "win32" and mode & 0o077:
        raise InputError(
            f"{path}: expected a private key that its owner alone can read (mode 600), found mode {mode:o}; type "
            f"chmod 600, and make a new key if others may have read it"
        )
    try:
        private = load_pem_private_key(data, None)
    except (TypeError, ValueError, InternalError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path}: expected a private key in PEM, found another file; check the path") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise InputError(f"{path}: expected an Ed25519 key, found another kind; make one with keys new")
    return CryptoSigner(private)


def _read(path: Path) -> bytes:
    try:
        return read_whole(path, max_bytes=_MAX_BYTES)
    except OSError as error:
        raise InputError(f"{path}: expected a key file, found {error.strerror}; check the path") from error
