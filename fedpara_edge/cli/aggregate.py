"""`fedpara-edge aggregate`: updates to the next weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedpara_edge.aggregation.config import AggregateConfig
from fedpara_edge.cli.command import Command
from fedpara_edge.cli.gates import (
    device_privacy_option,
    find_partial_seal,
    gate_options,
    open_budget,
    partial_key_options,
    privacy_folder,
    privacy_ledger_option,
    say_unsigned,
    signature_gate,
)
from fedpara_edge.cli.options import PATH, options_of
from fedpara_edge.cli.output import output_options
from fedpara_edge.cli.rounds import FOR_PARTIALS, RoundFiles, advance, files_options, write_sum
from fedpara_edge.errors import InputError

if TYPE_CHECKING:
    from fedpara_edge.aggregation.gate import Gate

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
@files_options
@gate_options
@device_privacy_option
@privacy_ledger_option
@click.option("--partial", is_flag=True, help="Write a partial to -o in place of weights, for `merge` and `finalize`.")
@partial_key_options
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
    device_privacy: str | None,
    privacy_ledger: Path | None,
    transcript: Path | None,
    partial: bool,
    key: Path | None,
    run: str | None,
    overwrite: bool,
    json: bool,
) -> None:
    """Average UPDATES and write the next weights, by the algorithm given.

    The order of UPDATES does not change a bit of the result. A bad update is refused and named and does not stop the
    others. What one update can do is bounded (--max-norm, --max-examples, --max-share), and outliers are named. The
    state folder gets one file for each round, whose name is the round's: that of --weights must be there, except at
    round 0. With a downlink codec the weights written are those that devices get by applying the change.
    """
    from fedpara_edge.aggregation.gate import Gates

    config = AggregateConfig(**{**options, **({"exact": True} if partial else {})})
    if partial:
        own_ledger = privacy_ledger if device_privacy is None else None
        _check_partial(options, keep=keep, change=change, transcript=transcript, privacy_ledger=own_ledger)
    if privacy_ledger is not None and config.privacy is None and device_privacy is None:
        raise InputError(
            "expected with --privacy or --device-privacy, found without; leave it out", key="privacy_ledger"
        )
    if key is not None and not partial:
        raise InputError("expected with --partial, found without; leave it out", key="key")
    seal = find_partial_seal(key, run, allow)
    with ExitStack() as stack:
        budget = stack.enter_context(open_budget(None if partial else config.privacy, privacy_ledger, state))
        gates = [
            stack.enter_context(signature_gate(allow, ledger, state, config.max_staleness)),
            stack.enter_context(_noise(device_privacy, privacy_ledger, state)),
        ]
        given = [gate for gate in gates if gate is not None]
        gate = Gates(given) if given else None
        if partial:
            write_sum(
                updates, weights, output, config, state=state, gate=gate, seal=seal, overwrite=overwrite, json=json
            )
        else:
            files = RoundFiles(output=output, state=state, keep=keep, change=change, transcript=transcript)
            advance(updates, weights, files, config, gate=gate, budget=budget, overwrite=overwrite, json=json)
    say_unsigned(allow)


def _check_partial(options: Mapping[str, Any], **files: Any) -> None:
    given = [name for name in options if name not in FOR_PARTIALS]
    given += [name for name, value in files.items() if value is not None]
    if given:
        raise InputError(
            "expected without --partial, found with it; leave it out here, and give it to finalize", key=given[0]
        )


@contextmanager
def _noise(text: str | None, ledger: Path | None, state: Path | None) -> Iterator[Gate | None]:
    """The gate that only updates with noise of their device's own pass; None without a budget for it."""
    if text is None:
        yield None
        return
    from fedpara_edge.aggregation.noised import NoiseGate
    from fedpara_edge.privacy.devices import find_device_budget, open_device_ledger

    budget = find_device_budget(text)
    with open_device_ledger(privacy_folder(ledger, state)) as opened:
        yield NoiseGate(budget, opened)
