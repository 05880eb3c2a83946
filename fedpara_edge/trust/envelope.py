"""The envelope of an update or a partial: a signature by the client or the aggregator, in a file beside it.

    update.safetensors          the update, as without a signature (`formats.update`)
    update.safetensors.dsse     a DSSE envelope (github.com/secure-systems-lab/dsse) in JSON, signed with Ed25519

Its payload, of type `application/vnd.fedpara-edge.update+json`, is JSON with these fields and no others:

    sha256        of the update file
    run           name of the federation's run, so that nothing is replayed in another
    fingerprint, round, base, client, examples
                  as the header of the update has them

That of a partial, of type `application/vnd.fedpara-edge.partial+json`, has

    digest        of the partial, as its header states it, which is checked when it is read (`formats.partial`)
    run           as above
    fingerprint, round, base
                  as the header of the partial has them
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import Error
from securesystemslib.signer import Key, Signer

from fedpara_edge.errors import InvalidUpdateError, TrustError
from fedpara_edge.formats.partial import FORMAT as PARTIAL
from fedpara_edge.formats.update import FORMAT, REMEDY
from fedpara_edge.storage.atomic import replacing_file, sha256_of
from fedpara_edge.storage.tensorfile import TensorFile
from fedpara_edge.storage.tensortable import strict_json
from fedpara_edge.storage.wholefile import read_whole

SUFFIX = ".dsse"
_MAX_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Statement:
    """What a client signs of its update; the module describes the fields."""

    payload_type: ClassVar[str] = "application/vnd.fedpara-edge.update+json"
    kind: ClassVar[str] = "an update"

    sha256: str
    run: str
    fingerprint: str
    round: int
    base: str
    client: str
    examples: int


@dataclass(frozen=True, kw_only=True)
class PartialStatement:
    """What an aggregator signs of its partial; the module describes the fields."""

    payload_type: ClassVar[str] = "application/vnd.fedpara-edge.partial+json"
    kind: ClassVar[str] = "a partial"

    digest: str
    run: str
    fingerprint: str
    round: int
    base: str


Stated = TypeVar("Stated", Statement, PartialStatement)

HEADER_FIELDS = ("fingerprint", "round", "base", "client", "examples")
"""Fields that the header of the update has too."""
PARTIAL_FIELDS = ("digest", "fingerprint", "round", "base")
"""Fields that the header of the partial has too."""


def envelope_path(update: Path) -> Path:
    """Path of the envelope of an update.

    >>> envelope_path(Path("a/update.safetensors")).as_posix()
    'a/update.safetensors.dsse'
    """
    return update.with_name(update.name + SUFFIX)


def write_envelope(update: Path, output: Path, signer: Signer, run: str) -> None:
    """Sign a complete update file that is about to appear as `output`, and write the envelope for that name.

    Raises:
        InvalidUpdateError: The file is no update.
        FedparaError: The disk refuses the write.
    """
    with TensorFile(update, format=FORMAT, error=InvalidUpdateError) as file:
        header = {name: file.header[name] for name in HEADER_FIELDS}
    _sign(Statement(sha256=sha256_of(update), run=run, **header), output, signer)


def write_partial_envelope(partial: Path, output: Path, signer: Signer, run: str) -> None:
    """Sign a complete partial that is about to appear as `output`, and write the envelope for that name.

    Raises:
        InvalidUpdateError: The file is no partial.
        FedparaError: The disk refuses the write.
    """
    with TensorFile(partial, format=PARTIAL, error=InvalidUpdateError) as file:
        header = {name: file.header[name] for name in PARTIAL_FIELDS}
    _sign(PartialStatement(run=run, **header), output, signer)


def _sign(statement: Statement | PartialStatement, output: Path, signer: Signer) -> None:
    payload = json.dumps(asdict(statement), sort_keys=True, separators=(",", ":")).encode()
    envelope = Envelope(payload, statement.payload_type, {})
    envelope.sign(signer)
    with replacing_file(envelope_path(output)) as temporary:
        temporary.write_text(json.dumps(envelope.to_dict()) + "\n", encoding="ascii")


def read_envelope(update: Path) -> Envelope:
    """The envelope of an update or a partial, whose signature is still to be verified.

    Raises:
        TrustError: There is none, or it is damaged.
    """
    path = envelope_path(update)
    try:
        envelope = Envelope.from_dict(strict_json(read_whole(path, max_bytes=_MAX_BYTES).decode()))
        envelope.pae()  # what a signature is of, if there can be one
        return envelope
    except FileNotFoundError as error:
        raise TrustError(
            f"{update}: expected a signature in {path.name} beside it, found none; give --key where it is made",
            code="unsigned",
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, Error) as error:
        raise TrustError(f"{path}: expected an envelope, found a damaged one; {REMEDY}", code="forged") from error


def verified_statement(envelope: Envelope, key: Key, path: Path, kind: type[Stated]) -> Stated:
    """What is stated in an envelope, signed with a key.

    Args:
        envelope: Envelope.
        key: Key that must have signed it.
        path: File that it is beside.
        kind: Class of the statement that it must be.

    Raises:
        TrustError: The signature is not by that key, or the statement is another one.
    """
    try:
        envelope.verify([key], 1)
    except Error as error:
        raise TrustError(
            f"{path}: expected a signature by the listed key, found a forged one; leave it out", code="forged"
        ) from error
    try:
        stated: Any = strict_json(envelope.payload.decode())
        statement = kind(**stated)
        if envelope.payload_type != kind.payload_type or any(
            type(stated[field.name]).__name__ != field.type for field in fields(kind)
        ):
            raise ValueError
    except (ValueError, TypeError, AttributeError) as error:
        raise TrustError(
            f"{path}: expected a statement about {kind.kind}, found another signed one; use the release that wrote it",
            code="forged",
        ) from error
    return statement
