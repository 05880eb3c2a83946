"""Root metadata of The Update Framework: which keys sign for which role, and how many of them are needed.

    root         signs root metadata alone; a threshold of its keys; kept offline, by several people
    targets      signs which files there are
    snapshot     signs which metadata belong together
    timestamp    signs which of them is the newest, for a short time

A device is given one version of it, and from there follows newer ones, each signed by the threshold of the one before
and by its own. So keys are added and revoked by the next version, and no device need be touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root

from fedpara_edge.errors import InputError, TrustError
from fedpara_edge.storage.atomic import check_output, replacing_file
from fedpara_edge.storage.wholefile import read_whole
from fedpara_edge.trust.keys import is_private, read_public, read_signer

ROLES = ("root", "targets", "snapshot", "timestamp")


def make_root(
    output: Path,
    keys: Mapping[str, Sequence[Path]],
    *,
    days: int,
    threshold: int | None = None,
    previous: Path | None = None,
    signers: Sequence[Path] = (),
    overwrite: bool = False,
) -> Metadata[Root]:
    """Make the first version of root metadata, or the next one, and sign it with the private keys that are given.

    Args:
        output: File to write.
        keys: Key files of each role, private or public; a role that is left out has those of the version before, and
            the snapshot at first those of the timestamp.
        days: Days until it expires.
        threshold: Number of root keys that must sign; None for that of the version before, or 1.
        previous: Version before.
        signers: Further private keys to sign with, such as those of the version before.
        overwrite: Whether `output` may exist.

    Raises:
        InputError: A key or a role is missing, or there are fewer root keys than the threshold.
        OutputExistsError: `output` exists.
    """
    check_output(output, overwrite=overwrite, inputs=(previous,))
    if previous is None:
        root, given = Root(version=1), {"snapshot": keys.get("timestamp", ()), **keys}
    else:
        root, given = read_root(previous).signed, dict(keys)
        root.version += 1
    root.expires = after(days)
    for role in ROLES:
        files = given.get(role, ())
        if files:
            for keyid in list(root.roles[role].keyids):
                root.revoke_key(keyid, role)
        for file in files:
            root.add_key(read_public(file), role)
        if not root.roles[role].keyids:
            raise InputError("expected at least one key file, found none", key=f"{role}_key")
    root.roles["root"].threshold = threshold or root.roles["root"].threshold
    needed, there = root.roles["root"].threshold, len(root.roles["root"].keyids)
    if needed > there:
        raise InputError(f"expected at most the {there} root keys, found {needed}", key="threshold")
    metadata = Metadata(root)
    _sign(metadata, [*filter(is_private, keys.get("root", ())), *signers])
    _write(output, metadata, overwrite=overwrite)
    return metadata


def sign_root(path: Path, signers: Sequence[Path]) -> Metadata[Root]:
    """Add signatures to root metadata, so that each holder of a key can sign where the key is.

    Raises:
        InputError: The file is no root metadata, or a key can't be read.
    """
    metadata = read_root(path)
    _sign(metadata, signers)
    _write(path, metadata, overwrite=True)
    return metadata


def signatures(metadata: Metadata[Root]) -> tuple[int, int]:
    """Number of its own root keys that signed root metadata, and of those that must."""
    found = metadata.signed.get_verification_result("root", metadata.signed_bytes, metadata.signatures)
    return len(found.signed), found.threshold


def read_root(path: Path) -> Metadata[Root]:
    """Root metadata of a file, whose signatures are still to be verified.

    Raises:
        InputError: The file can't be read, or is something else.
    """
    try:
        data = read_whole(path)
    except OSError as error:
        raise InputError(f"{path}: expected root metadata, found {error.strerror}; check the path") from error
    return parse_root(path, data)


def parse_root(path: Path, data: bytes) -> Metadata[Root]:
    """Root metadata of bytes from a file.

    Raises:
        InputError: They are something else.
    """
    try:
        metadata = Metadata[Root].from_bytes(data)
        _ = metadata.signed_bytes  # what a signature is of, if there can be one
    except RepositoryError as error:
        raise InputError(f"{path}: expected root metadata, found another file; check the path") from error
    if not isinstance(metadata.signed, Root):
        raise InputError(f"{path}: expected root metadata, found other metadata; check the path")
    return metadata


def check_root(path: Path, metadata: Metadata[Root], by: Iterable[Root]) -> None:
    """Refuse root metadata that are not signed as each of some versions asks for.

    Raises:
        TrustError: Signatures are missing or forged.
    """
    for root in by:
        found = root.get_verification_result("root", metadata.signed_bytes, metadata.signatures)
        if not found:
            raise TrustError(
                f"{path}: expected signatures of {found.threshold} root keys of version {root.version}, found "
                f"{len(found.signed)}; let others sign it with keys sign",
                code="wrong_root",
            )


def after(days: int) -> datetime:
    """The moment so many days from now."""
    return datetime.now(UTC) + timedelta(days=days)


def _sign(metadata: Metadata[Root], signers: Iterable[Path]) -> None:
    for file in signers:
        metadata.sign(read_signer(file), append=True)


def _write(path: Path, metadata: Metadata[Root], *, overwrite: bool) -> None:
    with replacing_file(path, overwrite=overwrite) as temporary:
        temporary.write_bytes(metadata.to_bytes())
