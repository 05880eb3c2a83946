"""`fedpara-edge pull`: a bundle or weights from a repository of the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import click

from fedpara_edge.cli.command import Command
from fedpara_edge.cli.options import PATH
from fedpara_edge.cli.output import emit, output_options
from fedpara_edge.errors import counted


@click.command("pull", cls=Command)
@click.argument("repository", metavar="OWNER/NAME")
@click.option("-o", "--output", type=PATH, required=True, help="Bundle folder to make, or weights file to write.")
@click.option("--weights", is_flag=True, help="Pull the newest weights in place of the bundle.")
@click.option("--revision", help="Branch, tag or commit.  [default: main]")
@click.option(
    "--max-mb", type=click.IntRange(1), default=4096, show_default=True, help="Most megabytes of all files together."
)
@output_options
def command(
    repository: str, output: Path, weights: bool, revision: str | None, max_mb: int, overwrite: bool, json: bool
) -> None:
    """Pull the bundle of a repository of the Hugging Face Hub, or its newest weights; what comes is verified."""
    from fedpara_edge.cli.installed import require

    require("hub")
    from fedpara_edge.hub.repository import pull_bundle, pull_weights

    if weights:
        number = pull_weights(repository, output, revision=revision, max_bytes=max_mb << 20, overwrite=overwrite)
        result, text = {"output": output, "round": number}, f"{output}: weights after {counted(number, 'round')}"
    else:
        pull_bundle(repository, output, revision=revision, max_bytes=max_mb << 20, overwrite=overwrite)
        result, text = {"output": output}, f"{output}: the bundle of {repository}"
    emit({"repository": repository, **result}, text, as_json=json)
