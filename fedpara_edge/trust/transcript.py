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
files give the very same weights on every machine of a kind.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedpara_edge.aggregation import AggregateConfig, Round, run_round
from fedpara_edge.errors import InputError, TrustError
from fedpara_edge.formats.weights import Weights, read_weights
from fedpara_edge.options.binding import bind
from fedpara_edge.storage.atomic import replacing_file, sha256_of
from fedpara_edge.storage.rounds import round_path
from fedpara_edge.storage.tensortable import strict_json

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


def write_transcript(path: Path, done: Round, base: Weights, config: AggregateConfig, *, overwrite: bool) -> Transcript:
    """Write the transcript of a round that was just done.

    Raises:
        OutputExistsError: The file exists with other content, and `overwrite` is false.
        FedparaError: The disk refuses the write.
    """
    accepted = [
        {"client": update.client, "examples": update.examples, "sha256": sha256_of(update.path)}
        for update in done.aggregation.accepted
    ]
    weights = done.aggregation.weights
    transcript = Transcript(
        fingerprint=weights.fingerprint,
        round=weights.round,
        base=base.base,
        result=weights.base,
        config={name: value for name, value in asdict(config).items() if value is not None},
        updates=sorted(accepted, key=lambda update: str(update["sha256"])),
    )
    data = {"format": FORMAT, "version": 1, **asdict(transcript), "tree": tree_hash(transcript.digests)}
    with replacing_file(path, overwrite=overwrite) as temporary:
        temporary.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return transcript


def read_transcript(path: Path) -> Transcript:
    """Read a transcript and verify its tree.

    Raises:
        InputError: The file can't be read, or is something else.
        TrustError: The list of updates is not the one that the tree was made of.
    """
    try:
        data = strict_json(path.read_text(encoding="utf-8"))
        if (data.pop("format"), data.pop("version")) != (FORMAT, 1):
            raise ValueError("another format")
        if type(data["round"]) is not int:
            raise ValueError("no round")
        tree, transcript = data.pop("tree"), Transcript(**data)
        found = tree_hash(transcript.digests)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: expected a transcript of a round, found another file ({error})") from error
    if found != tree:
        raise TrustError(
            f"{path}: expected updates with the tree hash {str(tree)[:12]}…, found {found[:12]}…: the list was changed",
            code="transcript",
        )
    return transcript


def audit(
    transcript: Transcript, updates: Iterable[Path], weights: Path, published: Path, *, state: Path | None = None
) -> Weights:
    """Recompute the weights of a round from its updates and compare them with those that were published.

    Args:
        transcript: Transcript of the round.
        updates: Files, among which the accepted updates have to be; others are passed over.
        weights: Weights before the round.
        published: Weights that were published after it.
        state: State folder of the server, where the algorithm or the downlink keeps something.

    Returns:
        The recomputed weights, which are those that were published.

    Raises:
        TrustError: An update is missing, or the weights are others.
        InputError: A file can't be read, or is missing.
    """
    by_digest = {sha256_of(path): path for path in updates}
    missing = [update for update in transcript.updates if update["sha256"] not in by_digest]
    if missing:
        raise TrustError(
            f"expected the {len(transcript.updates)} updates of the transcript, found {len(missing)} of them missing, "
            f"the first that of {missing[0]['client']!r} with SHA-256 {missing[0]['sha256'][:12]}…",
            code="transcript",
        )
    for path, expected in ((weights, transcript.base), (published, transcript.result)):
        found = read_weights(path).base
        if found != expected:
            raise _other(path, expected, found)
    config = bind(AggregateConfig, transcript.config)
    with TemporaryDirectory() as name:
        folder = Path(name)
        before = None if state is None else round_path(state, transcript.round - 1)
        if before is not None and before.is_file():
            (folder / "state").mkdir()
            shutil.copyfile(before, folder / "state" / before.name)
        done = run_round(
            [by_digest[digest] for digest in transcript.digests],
            weights,
            folder / "weights.safetensors",
            config,
            state=None if state is None else folder / "state",
            change=None if config.downlink_codec is None else folder / "change.safetensors",
        )
        recomputed = read_weights(done.output)
    if recomputed.base != transcript.result or len(done.aggregation.accepted) != len(transcript.updates):
        raise _other(published, recomputed.base, transcript.result)
    return recomputed


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


def _other(path: Path, expected: str, found: str) -> TrustError:
    return TrustError(
        f"{path}: expected the weights {expected[:12]}…, found {found[:12]}…: they are not those of the updates",
        code="transcript",
    )
