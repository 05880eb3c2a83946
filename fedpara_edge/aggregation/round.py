"""A round of the server on its files: what is needed is read, aggregated, and what comes of it is written.

The order of writing is change, state, transcript, weights, so that where the weights of a round are, all that belongs
with them is. States of older rounds are removed only after that. A round is the same whenever it is done, so one that
was killed is completed by doing it again: files that are there already stay if they are what would be written, byte for
byte.

The codec of a downlink decodes to other weights than the server made. These *published* weights are those of the next
round, and what they lack is kept in the server state and sent with the next change (error feedback).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedpara_edge.aggregation.aggregation import aggregate
from fedpara_edge.aggregation.config import AggregateConfig
from fedpara_edge.aggregation.gate import Gate, HashingGate
from fedpara_edge.aggregation.result import Aggregation
from fedpara_edge.aggregation.staleness import following as following_history
from fedpara_edge.aggregation.staleness import recent
from fedpara_edge.errors import FedparaError, InputError, TrustError
from fedpara_edge.formats.change import publish_change
from fedpara_edge.formats.history import History
from fedpara_edge.formats.serverstate import (
    RESIDUAL,
    ServerState,
    read_state_for,
    state_of,
    write_server_state,
)
from fedpara_edge.formats.weights import Weights, read_weights, write_weights
from fedpara_edge.privacy.budget import Budget, Privacy
from fedpara_edge.storage.atomic import check_output
from fedpara_edge.storage.locking import hold_folder
from fedpara_edge.storage.rounds import remove_rounds_before, round_path
from fedpara_edge.storage.tensorfile import TensorFile
from fedpara_edge.storage.wholefile import real_path

LOCK = ".lock"
"""Name of the lock's file in a state folder."""
LEAST_KEPT = 2
"""Fewest states to keep: the newest, and the one before it, from which the newest round can be aggregated again."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """A finished round: what the updates came to, and the files that were written.

    Args:
        aggregation: Weights and server state as they were written, and what is known of the updates.
        output: File with the next weights.
        weights_bytes: Size of that file.
        change: File with the change that leads to these weights; None where whole weights are sent.
        change_bytes: Size of that file.
        state: Server state file that belongs with the next weights; None where nothing is kept.
    """

    aggregation: Aggregation
    output: Path
    weights_bytes: int
    change: Path | None
    change_bytes: int | None
    state: Path | None

    @property
    def number(self) -> int:
        """The number of rounds that led to the weights."""
        return self.aggregation.weights.round

    def to_json(self) -> dict[str, Any]:
        """Files and numbers, plain data for `json.dumps`; what there is none of is left out."""
        files = {
            "output": str(self.output),
            "weights_bytes": self.weights_bytes,
            "state": None if self.state is None else str(self.state),
            "change": None if self.change is None else str(self.change),
            "change_bytes": self.change_bytes,
        }
        return {
            **{name: value for name, value in files.items() if value is not None},
            **self.aggregation.to_json(),
        }


DEFAULT = AggregateConfig()


def run_round(
    updates: Iterable[Path | str],
    weights: Path | str,
    output: Path | str,
    config: AggregateConfig = DEFAULT,
    *,
    state: Path | str | None = None,
    change: Path | str | None = None,
    transcript: Path | str | None = None,
    keep: int | None = None,
    gate: Gate | None = None,
    budget: Budget | None = None,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Round:
    """Aggregate update files and write the next weights, and with them the change and the server state.

    What can't be written is refused before any update is read. A process that is killed leaves either no weights at
    `output` or everything that belongs with them; the same call completes the round.

    Args:
        updates: Update files, in any order.
        weights: Weights file that the updates were trained from.
        output: Weights file to write.
        config: Algorithm, weighting and the like.
        state: Folder with the server state of every round, made if it is missing; None where neither the algorithm nor
            the downlink keeps anything.
        change: Change file to write, with `config.downlink_codec`.
        transcript: Transcript to write, for audits.
        keep: Number of rounds, from 2 on, whose state stays in the folder; None for all.
        gate: Judge of whose each update is, such as by signatures; None to believe the names in the files.
        budget: Budget that pays for the round, with `config.privacy` (`fedpara_edge.privacy.ledger`).
        overwrite: Whether to replace files that exist with other content.
        on_progress: Function that is called with the number of files read and of all to read.

    Raises:
        OutputExistsError: A file exists, and is not what this round writes.
        BusyError: Another process uses the state folder.
        InputError: A file can't be written; the weights, the state or an option is missing or does not fit.
        WrongBundleError: The weights or the state are damaged, or do not belong together.
        TooFewUpdatesError: There are fewer valid updates than asked for; its `rejected` tells of the others.
        BudgetError: The round would take more than what is left of the privacy budget.
        DivergedError: The next weights would be beyond float32, and no single update is to blame.
        InvalidUpdateError, TrustError: An update is bad, with `config.strict`.
        FedparaError: The disk refuses a write.
    """
    output = Path(output)
    state, change, transcript = (None if path is None else Path(path) for path in (state, change, transcript))
    _check_options(config, state=state, change=change, keep=keep)
    base, files = read_weights(Path(weights)), tuple(map(Path, updates))
    target = None if state is None else round_path(state, base.round + 1)
    gate = HashingGate() if gate is None and transcript is not None else gate
    inputs = (Path(weights), *files)
    _check_outputs(output, change, target, transcript, base=base, inputs=inputs, overwrite=overwrite)
    again = not overwrite and any(path.exists() for path in (output, change, target, transcript) if path is not None)
    privacy = _privacy(config, budget, again=again)
    with nullcontext() if state is None else hold_folder(state, kind="a state folder", lock=LOCK, parents=False):
        kept = None if state is None else _read_state(state, base, config)
        history = recent(kept, base, config.max_staleness)
        aggregation = aggregate(
            files,
            base,
            algorithm=config.server_algorithm,
            state=kept,
            weighting=config.weighting,
            merge=config.merge,
            bounds=config.bounds,
            method=config.method,
            exact=config.exact,
            strict=config.strict,
            min_updates=config.min_updates,
            gate=gate,
            privacy=privacy,
            history=history,
            on_progress=on_progress,
        )
        if gate is not None:
            gate.record(aggregation.identities, base)
        written = _write(
            aggregation,
            base,
            kept,
            history,
            output=output,
            change=change,
            state=target,
            transcript=transcript,
            config=config,
            overwrite=overwrite,
        )
        if state is not None and keep is not None:
            remove_rounds_before(state, base.round + 2 - keep)
    return Round(
        aggregation=written,
        output=output,
        weights_bytes=output.stat().st_size,
        change=change,
        change_bytes=None if change is None else change.stat().st_size,
        state=target,
    )


def _check_options(config: AggregateConfig, *, state: Path | None, change: Path | None, keep: int | None) -> None:
    if config.downlink_codec is None and change is not None:
        raise InputError(f"expected a codec for the change {change}, found none; give one", key="downlink_codec")
    if config.downlink_codec is not None and change is None:
        raise InputError("expected a file for the published change, found none; give one", key="change")
    keeper = None if config.downlink_codec is None else f"the downlink's codec {config.downlink_codec}"
    if config.server_algorithm.groups:
        keeper = f"algorithm {config.server_algorithm.name}"
    if config.max_staleness:
        keeper = "a round that takes late updates"
    if state is None and keeper is not None:
        raise InputError(f"expected a folder for what {keeper} keeps, found none; give one", key="state")
    if keep is not None and (type(keep) is not int or keep < LEAST_KEPT):
        raise InputError(f"expected a number of rounds, at least {LEAST_KEPT}, found {keep!r}", key="keep")
    if keep is not None and state is None:
        raise InputError("expected with a state folder, found none; give one, or leave keep out", key="keep")


def _privacy(config: AggregateConfig, budget: Budget | None, *, again: bool) -> Privacy | None:
    mechanism = config.mechanism
    if mechanism is None and budget is not None:
        raise InputError("expected noise for the ledger of a budget, found none; give it", key="privacy")
    if mechanism is not None and budget is None:
        raise InputError("expected the ledger of its budget, found none; give it", key="privacy")
    return None if mechanism is None or budget is None else Privacy(mechanism=mechanism, budget=budget, again=again)


def _check_outputs(
    output: Path,
    change: Path | None,
    state: Path | None,
    transcript: Path | None,
    *,
    base: Weights,
    inputs: Sequence[Path],
    overwrite: bool,
) -> None:
    """Refuse files that would be written over one another, that can't be written, or that are of another round."""
    files = {"weights": output, "change": change, "server state": state, "transcript": transcript}
    found = {name: path for name, path in files.items() if path is not None}
    names: dict[Path, str] = {}
    for name, path in found.items():
        if (other := names.setdefault(real_path(path), name)) != name:
            raise InputError(f"{path}: expected a file of its own for the {name}, found that of the {other}")
    written = [path.exists() for path in (change, state, output) if path is not None]
    was_cut_short = written == sorted(written, reverse=True)
    for path in found.values():
        if path == state and not path.parent.is_dir():
            check_output(path.parent, overwrite=True, folder=True)
        else:
            is_ours = _is_transcript if path == transcript else _is_of_next_round
            done = (was_cut_short or path == transcript) and path.is_file() and is_ours(path, base)
            check_output(path, overwrite=overwrite or done, inputs=inputs)


def _is_of_next_round(path: Path, base: Weights) -> bool:
    try:
        with TensorFile(path, format=None, error=FedparaError) as file:
            found = file.header.get("fingerprint"), file.header.get("round")
    except FedparaError:
        return False
    return found == (base.fingerprint, base.round + 1)


def _is_transcript(path: Path, base: Weights) -> bool:
    """Whether a file is a transcript of this round, in which other updates may have counted."""
    from fedpara_edge.formats.transcript import read_transcript

    try:
        found = read_transcript(path)
    except (InputError, TrustError):
        return False
    return (found.fingerprint, found.round, found.base) == (base.fingerprint, base.round + 1, base.base)


def _read_state(folder: Path, base: Weights, config: AggregateConfig) -> ServerState | None:
    """The state of the round before; None if there is none yet."""
    state = read_state_for(folder, base)
    if state is not None and RESIDUAL in state.groups and config.downlink_codec is None:
        raise InputError(
            f"expected one as in the round before, whose change left something to send "
            f"({round_path(folder, base.round)}), found none; float32 leaves nothing",
            key="downlink_codec",
        )
    return state


def _write(
    aggregation: Aggregation,
    base: Weights,
    kept: ServerState | None,
    history: History,
    *,
    output: Path,
    change: Path | None,
    state: Path | None,
    transcript: Path | None,
    config: AggregateConfig,
    overwrite: bool,
) -> Aggregation:
    """Write the files of a round; the aggregation with the weights and the state that are in them."""
    weights = aggregation.weights
    groups = {} if aggregation.state is None else dict(aggregation.state.groups)
    if change is not None and (encoder := config.downlink_encoder) is not None:
        residual = None if kept is None else kept.groups.get(RESIDUAL)
        target = replace(weights, tensors={**base.tensors, **aggregation.tensors})
        published = publish_change(change, base, target, encoder, residual=residual, overwrite=overwrite)
        weights = published.weights
        if any(tensor.any() for tensor in published.residual.values()):
            groups[RESIDUAL] = published.residual
    following = None
    if state is not None:
        counted = [(update.client, update.staleness) for update in aggregation.accepted]
        past = following_history(history, base, counted, config.max_staleness)
        following = replace(state_of(weights, aggregation.algorithm, groups), history=past)
        write_server_state(state, following, overwrite=overwrite)
    if transcript is not None:
        from fedpara_edge.formats.transcript import Transcript, write_transcript

        listed = Transcript(
            fingerprint=weights.fingerprint,
            round=weights.round,
            base=base.base,
            result=weights.base,
            config={name: value for name, value in asdict(config).items() if value is not None},
            updates=aggregation.listing,
        )
        write_transcript(transcript, listed, overwrite=overwrite)
    write_weights(output, weights, overwrite=overwrite)
    return replace(aggregation, weights=weights, state=following)
