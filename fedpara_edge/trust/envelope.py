"""The envelope of an update: a signature by the client, in a file beside the update.

    update.safetensors          the update, as without a signature (`formats.update`)
    update.safetensors.dsse     a DSSE envelope (github.com/secure-systems-lab/dsse) in JSON, signed with Ed25519

Its payload, of type `application/vnd.fedpara-edge.update+json`, is JSON with these fields and no others:

    sha256        of the update file
    run           name of the federation's run, so that nothing is replayed in another
    fingerprint, round, base, client, examples
                  as the header of the update has them
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import Error
from securesystemslib.signer import Key, Signer

from fedpara_edge.errors import InvalidUpdateError, TrustError
from fedpara_edge.formats.update import FORMAT, REMEDY
from fedpara_edge.storage.atomic import replacing_file, sha256_of
from fedpara_edge.storage.tensorfile import TensorFile
from fedpara_edge.storage.tensortable import strict_json

SUFFIX = ".dsse"
PAYLOAD_TYPE = "application/vnd.fedpara-edge.update+json"
_MAX_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Statement:
    """What a client signs of its update; the module describes the fields."""

    sha256: str
    run: str
    fingerprint: str
    round: int
    base: str
    client: str
    examples: int


HEADER_FIELDS = ("fingerprint", "round", "base", "client", "examples")
"""Fields that the header of the update has too."""


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
    statement = Statement(sha256=sha256_of(update), run=run, **header)
    payload = json.dumps(asdict(statement), sort_keys=True, separators=(",", ":")).encode()
    envelope = Envelope(payload, PAYLOAD_TYPE, {})
    envelope.sign(signer)
    with replacing_file(envelope_path(output)) as temporary:
        temporary.write_text(json.dumps(envelope.to_dict()) + "\n", encoding="ascii")


def read_envelope(update: Path) -> Envelope:
    """The envelope of an update, whose signature is still to be verified.

    Raises:
        TrustError: There is none, or it is damaged.
    """
    path = envelope_path(update)
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES} bytes")
        envelope = Envelope.from_dict(strict_json(data.decode()))
        envelope.pae()  # what a signature is of, if there can be one
        return envelope
    except FileNotFoundError as error:
        raise TrustError(
            f"{update}: expected a signature in {path.name} beside it, found none; train with --key", code="unsigned"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, Error) as error:
        raise TrustError(f"{path}: expected an envelope, found a damaged one; {REMEDY}", code="forged") from error


def verified_statement(envelope: Envelope, key: Key, update: Path) -> Statement:
    """What is stated in an envelope, signed with a key.

    Raises:
        TrustError: The signature is not by that key, or the statement is not one about an update.
    """
    try:
        envelope.verify([key], 1)
    except Error as error:
        raise TrustError(
            f"{update}: expected a signature by its client's key, found a forged one; leave it out", code="forged"
        ) from error
    try:
        stated: Any = strict_json(envelope.payload.decode())
        statement = Statement(**stated)
        if envelope.payload_type != PAYLOAD_TYPE or any(
            type(stated[field.name]).__name__ != field.type for field in fields(Statement)
        ):
            raise ValueError
    except (ValueError, TypeError, AttributeError) as error:
        raise TrustError(
            f"{update}: expected a statement about an update, found another signed one; use the release that wrote it",
            code="forged",
        ) from error
    return statement
