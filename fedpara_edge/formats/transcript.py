"""The transcript of a round: what anybody needs to recompute the published weights from the updates, to the last bit.

JSON, with these fields:

    format, version   fedpara-edge/transcript, 1
    fingerprint       of the bundle
    round             of the weights that the round led to
    base, result      digests of the weights before and after (`formats.weights`)
    config            options of the aggregation that are not None
    updates           [{"client", "examples", "sha256"}, …] for each accepted update, sorted by SHA-256
    tree              hexadecimal Merkle tree hash of the list of SHA-256, as in RFC 6962, section 2.1

The aggregation does not depend on the order of the updates, nor on those that were refused, so that the list and the
files give the very same weights on every machine of a kind. A transcript of a round with noise for differential privacy
says so in its config, and can't be audited.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedpara_edge.errors import InputError, TrustError, brief_text
from fedpara_edge.storage.atomic import replacing_file
from fedpara_edge.storage.tensortable import strict_json
from fedpara_edge.storage.wholefile import read_text

FORMAT = "fedpara-edge/transcript"


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """A transcript; the module describes the fields."""

    fingerprint: str
    round: int
    base: str
    result: str
    config: Mapping[str, Any]
    updates: Sequence[Mapping[str, Any]]

    @property
    def digests(self) -> list[str]:
        """SHA-256 of the updates, hexadecimal."""
        return [str(update["sha256"]) for update in self.updates]


def write_transcript(path: Path, transcript: Transcript, *, overwrite: bool) -> None:
    """Write a transcript with its tree.

    Raises:
        OutputExistsError: The file exists with other content, and `overwrite` is false.
        FedparaError: The disk refuses the write.
    """
    data = {"format": FORMAT, "version": 1, **asdict(transcript), "tree": tree_hash(transcript.digests)}
    with replacing_file(path, overwrite=overwrite) as temporary:
        temporary.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_transcript(path: Path) -> Transcript:
    """Read a transcript and verify its tree.

    Raises:
        InputError: The file can't be read, or is something else.
        TrustError: The list of updates is not the one that the tree was made of.
    """
    try:
        data = strict_json(read_text(path))
        if (data.pop("format"), data.pop("version")) != (FORMAT, 1):
            raise ValueError("another format")
        if type(data["round"]) is not int:
            raise ValueError("no round")
        tree, transcript = data.pop("tree"), Transcript(**data)
        found = tree_hash(transcript.digests)
    except OSError as error:
        raise InputError(f"{path}: expected a transcript of a round, found {error.strerror}; check the path") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: expected a transcript of a round, found another file ({error})") from error
    if found != tree:
        raise TrustError(
            f"{path}: expected updates with the tree hash {brief_text(tree, max_length=12)}, found {found[:12]}…: the "
            "list was changed",
            code="transcript",
        )
    return transcript


def tree_hash(digests: Sequence[str]) -> str:
    """Merkle tree hash of hexadecimal digests, each the data of a leaf (RFC 6962, section 2.1).

    >>> tree_hash([])[:8], tree_hash(["00"])[:8]
    ('e3b0c442', '96a296d2')
    """
    return _tree([bytes.fromhex(digest) for digest in digests]).hex()


def _tree(leaves: Sequence[bytes]) -> bytes:
    if not leaves:
        return hashlib.sha256().digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    half = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\1" + _tree(leaves[:half]) + _tree(leaves[half:])).digest()
