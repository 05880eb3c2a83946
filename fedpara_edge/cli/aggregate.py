"""`fedpara-edge aggregate`: updates to the next weights."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from fedpara_edge.aggregation.config import AggregateConfig
from fedpara_edge.cli.command import Command
from fedpara_edge.cli.log import event
from fedpara_edge.cli.options import PATH, options_of
from fedpara_edge.cli.output import emit, megabytes, note, output_options
from fedpara_edge.cli.streams import drawing
from fedpara_edge.errors import FedparaError, InputError, TooFewUpdatesError

if TYPE_CHECKING:
    from fedpara_edge.aggregation import Accepted, Round
    from fedpara_edge.aggregation.gate import Gate
    from fedpara_edge.privacy.ledger import PrivacyLedger

RENAMED = {
    "--server-lr": "--algorithm NAME:lr=…",
    **{f"--{name}": f"--algorithm NAME:{name}=…" for name in ("momentum", "beta1", "beta2", "tau", "alpha")},
}
"""Options that an algorithm now takes after its name."""


@click.command("aggregate", cls=Command, renamed=RENAMED)
@click.argument("updates", nargs=-1, type=PATH)
@click.option("--weights", type=PATH, required=True, help="Weights the updates started from.")
@click.option("-o", "--output", type=PATH, required=True, help="Next weights to write.")
@options_of(AggregateConfig)
@click.option("--state", type=PATH, help="The server's state folder: what the algorithm or the downlink keeps.")
@click.option("--keep", type=int, metavar="N", help="Rounds, from 2 on, whose state stays in --state.  [default: all]")
@click.option("--change", type=PATH, help="Change file to write; with --downlink-codec.")
@click.option("--allow", type=PATH, metavar="FILE", help="TOML file with keys of clients: signed updates alone count.")
@click.option("--ledger", type=PATH, help="Folder of what was accepted, with --allow.  [default: ledger in --state]")
@click.option(
    "--privacy-ledger",
    type=PATH,
    metavar="FOLDER",
    help="Folder of what is spent of the budget, with --privacy.  [default: privacy in --state]",
)
@click.option("--transcript", type=PATH, help="Transcript to write, for `audit`: digests of the accepted updates.")
@output_options
def command(
    updates: tuple[Path, ...],
    weights: Path,
    output: Path,
    options: Mapping[str, Any],
    state: Path | None,
    keep: int | None,
    change: Path | None,
    allow: Path | None,
    ledger: Path | None,
    privacy_ledger: Path | None,
    transcript: Path | None,
    overwrite: bool,
    json: bool,
) -> None:
    """Average UPDATES and write the next weights, by the algorithm given.

    The order of UPDATES does not change a bit of the result. A bad update is refused and named and does not stop the
    others. What one update can do is bounded (--max-norm, --max-examples, --max-share), and outliers are named. The
    state folder gets one file for each round, whose name is the round's: that of --weights must be there, except at
    round 0. With a downlink codec the weights written are those that devices get by applying the change.
    """
    from fedpara_edge.aggregation import run_round

    config = AggregateConfig(**options)
    try:
        with (
            _gate(allow, ledger, state) as gate,
            _budget(config, privacy_ledger, state) as budget,
            _progress_bar(len(updates)) as on_progress,
        ):
            done = run_round(
                updates,
                weights,
                output,
                config,
                state=state,
                change=change,
                transcript=transcript,
                keep=keep,
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
    if allow is None:
        note("note: updates are not signed, so that anybody can send under any name; outside local work, pass --allow")
    emit({**done.to_json(), **privacy.json}, _text(done) + privacy.text, as_json=json)


@contextmanager
def _gate(allow: Path | None, ledger: Path | None, state: Path | None) -> Iterator[Gate | None]:
    """The gate that only signed updates of the clients in a list pass; None without a list."""
    if allow is None:
        if ledger is not None:
            raise InputError("expected with --allow, found without; leave it out", key="ledger")
        yield None
        return
    if ledger is None and state is None:
        raise InputError("expected a folder for what was accepted, found none; give it, or --state", key="ledger")
    from fedpara_edge.cli.installed import require

    require("trust")
    from fedpara_edge.trust.clients import read_clients
    from fedpara_edge.trust.ledger import open_ledger
    from fedpara_edge.trust.signatures import SignatureGate

    clients = read_clients(allow)
    with open_ledger(ledger or Path(str(state)) / "ledger", clients.run) as opened:
        yield SignatureGate(clients, opened)


@contextmanager
def _budget(config: AggregateConfig, folder: Path | None, state: Path | None) -> Iterator[PrivacyLedger | None]:
    """The ledger of the privacy budget; None without noise."""
    if config.mechanism is None:
        if folder is not None:
            raise InputError("expected with --privacy, found without; leave it out", key="privacy_ledger")
        yield None
        return
    if folder is None and state is None:
        raise InputError("expected a folder for what is spent, found none; give it, or --state", key="privacy_ledger")
    from fedpara_edge.cli.installed import require

    require("privacy")
    from fedpara_edge.privacy.accounting import epsilon
    from fedpara_edge.privacy.ledger import open_privacy_ledger

    with open_privacy_ledger(folder or Path(str(state)) / "privacy", epsilon) as opened:
        yield opened


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
        f"{done.output}: round {done.number} from {len(result.accepted)} updates "
        f"({sum(update.examples for update in result.accepted)} examples), {len(result.rejected)} rejected"
        f"{_bounded(result.accepted)}\n"
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
            f"({result.gap.entries} composed weights of {len(result.gap.layers)} layers compared)"
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
