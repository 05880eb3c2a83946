"""`fedpara-edge split`: one data file to a file for each client."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from fedpara_edge.cli.command import Command
from fedpara_edge.cli.options import PATH, options_of
from fedpara_edge.cli.output import emit, output_options
from fedpara_edge.errors import counted
from fedpara_edge.simulation.data.federation import DataPlan


@click.command("split", cls=Command)
@click.argument("data", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="Folder to write.")
@options_of(DataPlan, without=("path",))
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@output_options
def command(
    data: Path,
    output: Path,
    options: Mapping[str, Any],
    seed: int,
    overwrite: bool,
    json: bool,
) -> None:
    """Deal the rows of DATA to clients, as `simulate` does, and write what `train` and `evaluate` take.

    OUTPUT gets train/CLIENT.npz, test/CLIENT.npz of what each holds out, and test.npz of the common test set.
    """
    from fedpara_edge.simulation.data.federation import load_federation, write_federation
    from fedpara_edge.storage.atomic import check_output

    check_output(output, overwrite=overwrite, folder=True, inputs=(data,))
    plan = DataPlan(path=data, **options)
    federation = load_federation(plan, seed)
    write_federation(federation, output)
    sizes = [len(client.train) for client in federation.clients]
    held = sum(len(client.test) for client in federation.clients if client.test is not None)
    result = {
        "folder": output,
        "clients": {
            client.name: {"train": len(client.train), "test": len(client.test) if client.test else 0}
            for client in federation.clients
        },
        "test": len(federation.test) if federation.test else 0,
        "left_out": list(federation.left_out),
    }
    lines = [
        f"{output}: {counted(len(sizes), 'client')} with {min(sizes)} to {counted(max(sizes), 'example')} to train "
        f"on, {sum(sizes)} in all"
    ]
    if held:
        lines.append(f"{held} held out by them")
    if federation.test is not None:
        lines.append(f"{len(federation.test)} in the common test set")
    if federation.left_out:
        lines.append(f"{len(federation.left_out)} left out with fewer than {plan.min_examples}")
    emit(result, "\n".join(lines), as_json=json)
