"""Rounds of the server on the command line: done, and told of."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from fedpara_edge.aggregation.config import AggregateConfig
from fedpara_edge.cli.log import event
from fedpara_edge.cli.options import PATH
from fedpara_edge.cli.output import Function, emit, megabytes, note
from fedpara_edge.cli.streams import drawing
from fedpara_edge.errors import FedparaError, TooFewUpdatesError, counted

if TYPE_CHECKING:
    from fedpara_edge.aggregation import Accepted, Round
    from fedpara_edge.aggregation.gate import Gate
    from fedpara_edge.privacy.ledger import PrivacyLedger
    from fedpara_edge.storage.atomic import Ready

FOR_PARTIALS = ("algorithm", "clients", "weighting", "privacy", "exact", "max_staleness", "min_updates", "strict")
"""Options that count when a partial is made; the others are for the round as a whole."""


@dataclass(frozen=True, kw_only=True)
class RoundFiles:
    """Files that a round writes, as they were given."""

    output: Path
    state: Path | None
    keep: int | None
    change: Path | None
    transcript: Path | None


def files_options(function: Function) -> Function:
    """The options of the `RoundFiles` besides `-o`."""
    for declare in reversed(_FILES):
        function = declare(function)
    return function


_FILES = (
    click.option("--state", type=PATH, help="The server's state folder: what the algorithm or the downlink keeps."),
    click.option(
        "--keep", type=int, metavar="N", help="Rounds, from 2 on, whose state stays in --state.  [default: all]"
    ),
    click.option("--change", type=PATH, help="Change file to write; with --downlink-codec."),
    click.option("--transcript", type=PATH, help="Transcript to write, for `audit`: digests of the accepted updates."),
)


def write_sum(
    files: tuple[Path, ...],
    weights: Path,
    output: Path,
    config: AggregateConfig,
    *,
    state: Path | None,
    gate: Gate | None = None,
    seal: Ready | None = None,
    overwrite: bool,
    json: bool,
) -> None:
    """Write the partial of some updates and partials, and say so."""
    from fedpara_edge.aggregation.partials import make_partial

    try:
        with _progress_bar(len(files)) as on_progress:
            made = make_partial(
                files,
                weights,
                output,
                config,
                state=state,
                gate=gate,
                seal=seal,
                overwrite=overwrite,
                on_progress=on_progress,
            )
    except TooFewUpdatesError as error:
        _show(error.rejected)
        raise
    _show([each.error for each in made.rejected])
    event("partial_written", output=output, round=made.round, updates=len(made.contributions))
    text = (
        f"{output}: partial of round {made.round + 1} from {counted(len(made.contributions), 'update')} "
        f"({counted(made.examples, 'example')}), {len(made.rejected)} rejected\n"
        f"{megabytes(made.bytes)} in place of {megabytes(sum(each.bytes for each in made.contributions))}"
    )
    emit(made.to_json(), text, as_json=json)


def advance(
    updates: tuple[Path, ...],
    weights: Path,
    files: RoundFiles,
    config: AggregateConfig,
    *,
    gate: Gate | None = None,
    budget: PrivacyLedger | None = None,
    overwrite: bool,
    json: bool,
) -> None:
    """Do a round, and say what came of it."""
    from fedpara_edge.aggregation import run_round

    try:
        with _progress_bar(len(updates)) as on_progress:
            done = run_round(
                updates,
                weights,
                files.output,
                config,
                state=files.state,
                change=files.change,
                transcript=files.transcript,
                keep=files.keep,
                gate=gate,
                budget=budget,
                overwrite=overwrite,
                on_progress=on_progress,
            )
            privacy = _spent(config, budget)
    except TooFewUpdatesError as error:
        _show(error.rejected)
        raise
    result = done.aggregation
    _show([update.error for update in result.rejected])
    _warn(result.accepted, config)
    event(
        "round_written",
        output=done.output,
        round=done.number,
        accepted=len(result.accepted),
        rejected=len(result.rejected),
        bounded=sum(bool(update.bounded) for update in result.accepted),
        examples=sum(update.examples for update in result.accepted),
        received_bytes=result.received_bytes,
    )
    emit({**done.to_json(), **privacy.json}, _text(done) + privacy.text, as_json=json)


class _Spent(NamedTuple):
    """What is said of the privacy budget."""

    json: Mapping[str, Any]
    text: str


def _spent(config: AggregateConfig, budget: PrivacyLedger | None) -> _Spent:
    if config.mechanism is None or budget is None:
        return _Spent({}, "")
    mechanism, spent = config.mechanism, budget.spent(config.mechanism.delta)
    text = f"\nprivacy: ε {spent:.4g} of {mechanism.epsilon:g} spent at δ {mechanism.delta:g}"
    return _Spent({"privacy": {**mechanism.to_json(), "spent": spent}}, text)


def _text(done: Round) -> str:
    result = done.aggregation
    text = (
        f"{done.output}: round {done.number} from {counted(len(result.accepted), 'update')} "
        f"({counted(sum(update.examples for update in result.accepted), 'example')}), {len(result.rejected)} rejected"
        f"{_bounded(result.accepted)}{_late(result.accepted)}\n"
        f"received {megabytes(result.received_bytes)}, {result.share:.1%} of the {megabytes(result.dense_bytes)} "
        "that the dense model costs in float32"
    )
    if result.rejected_bytes:
        text += f", and {megabytes(result.rejected_bytes)} that were rejected"
    if done.change_bytes is not None:
        text += f"\n{done.change}: {megabytes(done.change_bytes)} to each device"
    if result.gap is not None:
        text += (
            f"\naggregation gap {result.gap.relative:.2%} of the mean change "
            f"({result.gap.entries} composed weights of {counted(len(result.gap.layers), 'layer')} compared)"
        )
    if result.refit is not None:
        text += f"\nrefitted: {result.refit.before:.2%} -> {result.refit.after:.2%} of it"
    return text


def _show(rejected: Iterable[FedparaError]) -> None:
    for error in rejected:
        note(f"rejected [{error.code}] {error}")
        event("update_rejected", level=logging.WARNING, code=error.code, message=str(error))


def _bounded(accepted: Iterable[Accepted]) -> str:
    count = sum(bool(update.bounded) for update in accepted)
    return f", {count} bounded" if count else ""


def _late(accepted: Iterable[Accepted]) -> str:
    count = sum(update.staleness > 0 for update in accepted)
    return f", {count} late" if count else ""


def _warn(accepted: Iterable[Accepted], config: AggregateConfig) -> None:
    """Say which updates are out of the ordinary, and what of them counted."""
    for update in accepted:
        texts = {
            "examples": f"more than {config.max_examples:g} times the median of examples, {update.examples}: the rest "
            "does not count (--max-examples)",
            "share": f"more than {config.max_share:.0%} of the total weight: the rest goes to the others (--max-share)",
        }
        said = [texts[name] for name in update.bounded if name in texts]
        if update.norm_in_medians is not None and update.norm_in_medians > config.max_norm:
            scaled = f"scaled down to {config.max_norm:g} times (--max-norm)"
            counted = scaled if "norm" in update.bounded else "which counts in full (--unbounded norm)"
            said.append(f"a change of {update.norm_in_medians:.3g} times the median norm, {counted}")
        if said:
            note(f"outlier {update.path}: client {update.client!r}: {'; '.join(said)}")
            event(
                "update_outlying",
                level=logging.WARNING,
                client=update.client,
                bounded=update.bounded,
                scale=update.scale,
                norm_in_medians=update.norm_in_medians,
            )


@contextmanager
def _progress_bar(files: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, if that is a terminal."""
    with click.progressbar(
        length=files, label="reading", file=drawing(sys.stderr), hidden=not sys.stderr.isatty()
    ) as bar:
        yield lambda done, _: bar.update(done - bar.pos)
