"""The audit of a round: its weights recomputed from the updates, as its transcript (`formats.transcript`) has them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from fedpara_edge.aggregation import AggregateConfig, run_round
from fedpara_edge.aggregation.gate import Gate, HashingGate
from fedpara_edge.errors import InputError, TrustError, brief_text, counted
from fedpara_edge.formats.transcript import Transcript
from fedpara_edge.formats.weights import Weights, read_weights
from fedpara_edge.options.binding import bind
from fedpara_edge.storage.atomic import sha256_of
from fedpara_edge.storage.rounds import round_path

HASHING = HashingGate()


def audit(
    transcript: Transcript,
    updates: Sequence[Path],
    weights: Path,
    published: Path,
    *,
    state: Path | None = None,
    gate: Gate = HASHING,
) -> Weights:
    """Recompute the weights of a round from its updates and compare them with those that were published.

    Args:
        transcript: Transcript of the round.
        updates: Files, among which the accepted updates have to be; others are passed over.
        weights: Weights before the round.
        published: Weights that were published after it.
        state: State folder of the server, where the algorithm or the downlink keeps something.
        gate: Judge of whose each update is, such as by signatures; otherwise the names in the files are believed.

    Returns:
        The recomputed weights, which are those that were published.

    Raises:
        TrustError: An update is missing or is not its client's, or the weights or the list are others.
        InvalidUpdateError: An update is bad.
        InputError: A file can't be read, or is missing, or the round has noise.
    """
    config = replace(bind(AggregateConfig, transcript.config), strict=True)  # as all of them were accepted
    if config.mechanism is not None:
        raise InputError(
            f"expected the transcript of a round without noise, found {config.mechanism.name} noise, which nobody but "
            "its server can repeat; such a round can't be audited",
            key="privacy",
        )
    with ThreadPoolExecutor() as pool:
        by_digest = dict(zip(pool.map(sha256_of, updates), updates, strict=True))
    missing = [update for update in transcript.updates if update["sha256"] not in by_digest]
    if missing:
        raise TrustError(
            f"expected the {len(transcript.updates)} updates of the transcript, found {len(missing)} of them missing, "
            f"the first that of {missing[0]['client']!r} with SHA-256 "
            f"{brief_text(missing[0]['sha256'], max_length=12)}",
            code="transcript",
        )
    for path, expected in ((weights, transcript.base), (published, transcript.result)):
        found = read_weights(path).base
        if found != expected:
            raise _other(path, expected, found)
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
            gate=gate,
        )
        recomputed = read_weights(done.output)
    if recomputed.base != transcript.result:
        raise _other(published, recomputed.base, transcript.result)
    if done.aggregation.listing != transcript.updates:
        raise TrustError(
            f"expected the list of {counted(len(transcript.updates), 'update')} as their files have it, found other "
            "clients or "
            "examples in the transcript: the list was changed",
            code="transcript",
        )
    return recomputed


def _other(path: Path, expected: str, found: str) -> TrustError:
    return TrustError(
        f"{path}: expected the weights {expected[:12]}…, found {found[:12]}…: they are not those of the updates",
        code="transcript",
    )
