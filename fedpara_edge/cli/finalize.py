"""`fedpara-edge finalize`: partials to the next weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from fedpara_edge.aggregation.config import AggregateConfig
from fedpara_edge.cli.command import Command
from fedpara_edge.cli.gates import gate_options, open_budget, privacy_ledger_option, say_unsigned, signature_gate
from fedpara_edge.cli.options import PATH, options_of
from fedpara_edge.cli.output import output_options
from fedpara_edge.cli.rounds import RoundFiles, advance, files_options
from fedpara_edge.errors import InputError

IN_ONE_PASS = {"merge", "rule", "mixing", "space", "exact"}
"""Options that need all updates at once, or that go without saying."""


@click.command("finalize", cls=Command)
@click.argument("partials", nargs=-1, type=PATH, metavar="[PARTIAL|UPDATE]...")
@click.option("--weights", type=PATH, required=True, help="Weights the updates started from.")
@click.option("-o", "--output", type=PATH, required=True, help="Next weights to write.")
@options_of(AggregateConfig, without=IN_ONE_PASS)
@files_options
@gate_options
@privacy_ledger_option
@output_options
def command(
    partials: tuple[Path, ...],
    weights: Path,
    output: Path,
    options: Mapping[str, Any],
    state: Path | None,
    keep: int | None,
    change: Path | None,
    transcript: Path | None,
    allow: Path | None,
    ledger: Path | None,
    privacy_ledger: Path | None,
    overwrite: bool,
    json: bool,
) -> None:
    """Write the next weights from partials, and from update files beside them.

    They are those of `aggregate --exact` with all the updates, to the last bit. The updates that a bound of the round
    binds (--max-norm, --max-examples, --max-share) must be among the arguments; the error names them.
    """
    files = RoundFiles(output=output, state=state, keep=keep, change=change, transcript=transcript)
    config = AggregateConfig(**options, exact=True)
    if privacy_ledger is not None and config.privacy is None:
        raise InputError("expected with --privacy, found without; leave it out", key="privacy_ledger")
    with (
        signature_gate(allow, ledger, state, config.max_staleness) as gate,
        open_budget(config.privacy, privacy_ledger, state) as budget,
    ):
        advance(partials, weights, files, config, gate=gate, budget=budget, overwrite=overwrite, json=json)
    say_unsigned(allow)
