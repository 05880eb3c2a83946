"""`fedpara-edge audit`: published weights recomputed from the updates."""

from __future__ import annotations

from pathlib import Path

import click

from fedpara_edge.cli.command import Command
from fedpara_edge.cli.options import PATH
from fedpara_edge.cli.output import emit, json_option


@click.command("audit", cls=Command)
@click.argument("transcript", type=PATH)
@click.argument("updates", nargs=-1, type=PATH)
@click.option("--weights", type=PATH, required=True, help="Weights the updates started from.")
@click.option("--published", type=PATH, required=True, help="Weights that were published after the round.")
@click.option("--state", type=PATH, help="The server's state folder, where the algorithm or the downlink keeps some.")
@json_option
def command(
    transcript: Path, updates: tuple[Path, ...], weights: Path, published: Path, state: Path | None, json: bool
) -> None:
    """Recompute the weights of a round from UPDATES, as its TRANSCRIPT has them, and compare them bit by bit.

    Weights that are not those of the updates, and updates that are missing, end with exit code 5.
    """
    from fedpara_edge.trust.transcript import audit, read_transcript, tree_hash

    read = read_transcript(transcript)
    audit(read, updates, weights, published, state=state)
    text = f"{published}: round {read.round} is that of the {len(read.updates)} updates, to the last bit"
    result = {"published": published, "round": read.round, "updates": len(read.updates), "result": read.result}
    emit({**result, "tree": tree_hash(read.digests)}, text, as_json=json)
