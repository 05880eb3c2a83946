"""`fedpara-edge audit`: published weights recomputed from the updates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fedpara_edge.cli.command import Command
from fedpara_edge.cli.options import PATH
from fedpara_edge.cli.output import emit, json_option
from fedpara_edge.errors import counted

if TYPE_CHECKING:
    from fedpara_edge.aggregation.gate import Gate


@click.command("audit", cls=Command)
@click.argument("transcript", type=PATH)
@click.argument("updates", nargs=-1, type=PATH)
@click.option("--weights", type=PATH, required=True, help="Weights the updates started from.")
@click.option("--published", type=PATH, required=True, help="Weights that were published after the round.")
@click.option("--state", type=PATH, help="The server's state folder, where the algorithm or the downlink keeps some.")
@click.option("--allow", type=PATH, metavar="FILE", help="TOML file with keys of clients: verify their signatures too.")
@json_option
def command(
    transcript: Path,
    updates: tuple[Path, ...],
    weights: Path,
    published: Path,
    state: Path | None,
    allow: Path | None,
    json: bool,
) -> None:
    """Recompute the weights of a round from UPDATES, as its TRANSCRIPT has them, and compare them bit by bit.

    With --allow, each update needs its envelope beside it, signed by the client that the transcript names. Weights that
    are not those of the updates, and updates that are missing or forged, end with exit code 5.
    """
    from fedpara_edge.formats.transcript import read_transcript, tree_hash
    from fedpara_edge.trust.audit import HASHING, audit

    gate: Gate = HASHING
    if allow is not None:
        from fedpara_edge.cli.installed import require

        require("trust")
        from fedpara_edge.trust.clients import read_clients
        from fedpara_edge.trust.signatures import IdentityGate

        gate = IdentityGate(read_clients(allow))
    read = read_transcript(transcript)
    audit(read, updates, weights, published, state=state, gate=gate)
    signed = "" if allow is None else ", each signed by its client"
    text = (
        f"{published}: round {read.round} is that of the {counted(len(read.updates), 'update')}, to the last "
        f"bit{signed}"
    )
    result = {"published": published, "round": read.round, "updates": len(read.updates), "result": read.result}
    emit({**result, "tree": tree_hash(read.digests)}, text, as_json=json)
