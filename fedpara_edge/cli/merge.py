"""`fedpara-edge merge`: partials to one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from fedpara_edge.aggregation.config import AggregateConfig
from fedpara_edge.cli.command import Command
from fedpara_edge.cli.gates import (
    find_partial_seal,
    gate_options,
    partial_key_options,
    say_unsigned,
    signature_gate,
)
from fedpara_edge.cli.options import PATH, options_of
from fedpara_edge.cli.output import output_options
from fedpara_edge.cli.rounds import FOR_PARTIALS, write_sum
from fedpara_edge.options import declared

FOR_THE_ROUND = {name for name in declared(AggregateConfig) if name not in FOR_PARTIALS} | {"exact"}


@click.command("merge", cls=Command)
@click.argument("partials", nargs=-1, type=PATH, metavar="[PARTIAL|UPDATE]...")
@click.option("--weights", type=PATH, required=True, help="Weights the updates started from.")
@click.option("-o", "--output", type=PATH, required=True, help="Partial to write.")
@options_of(AggregateConfig, without=FOR_THE_ROUND)
@click.option("--state", type=PATH, help="Folder with the server's state of the round; with --max-staleness.")
@gate_options
@partial_key_options
@output_options
def command(
    partials: tuple[Path, ...],
    weights: Path,
    output: Path,
    options: Mapping[str, Any],
    state: Path | None,
    allow: Path | None,
    ledger: Path | None,
    key: Path | None,
    run: str | None,
    overwrite: bool,
    json: bool,
) -> None:
    """Put partials together into one, also with update files.

    Neither order nor grouping changes a byte of it. An update that is in several partials counts once, for which its
    file must be among the arguments, unless one of the partials has all that is in the other.
    """
    config, seal = AggregateConfig(**options, exact=True), find_partial_seal(key, run, allow)
    with signature_gate(allow, ledger, state, config.max_staleness) as gate:
        write_sum(partials, weights, output, config, state=state, gate=gate, seal=seal, overwrite=overwrite, json=json)
    say_unsigned(allow)
