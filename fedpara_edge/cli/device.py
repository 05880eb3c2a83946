"""`fedpara-edge device`: an agent that takes part in a federation by itself."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from device_runtime.agent.agent import AgentConfig
from device_runtime.config import OWN, TrainCall
from device_runtime.sources import Reading
from fedpara_edge.cli.command import Command
from fedpara_edge.cli.log import event, filled
from fedpara_edge.cli.options import DATA, PATH, options_of
from fedpara_edge.cli.output import emit, json_option, megabytes, note
from fedpara_edge.cli.received import find_seals
from fedpara_edge.cli.streams import drawing
from fedpara_edge.errors import counted
from fedpara_edge.options import declared


@click.command("device", cls=Command)
@click.argument("url")
@click.option("--data", type=PATH, required=True, help=DATA)
@click.option("--state", type=PATH, required=True, help="The agent's folder, made if it is missing.")
@click.option("--client", help="Name to join under.  [default: one that is made]")
@click.option(
    "--ca", type=PATH, help="Certificates that vouch for the server, PEM.  [default: the link's, the system's]"
)
@click.option(
    "--key",
    type=PATH,
    metavar="FILE",
    help="Private key of this device, to sign updates with where the server asks for it.",
)
@options_of(AgentConfig, into="config")
@options_of(TrainCall, without=[name for name in declared(TrainCall) if name not in OWN], into="own")
@options_of(Reading, into="reading")
@json_option
def command(
    url: str,
    data: Path,
    state: Path,
    client: str | None,
    ca: Path | None,
    key: Path | None,
    config: Mapping[str, Any],
    own: Mapping[str, Any],
    reading: Mapping[str, Any],
    json: bool,
) -> None:
    """Join the federation at URL, the link that `serve` shows, and train on local data in every round until it ends.

    The data stays here; updates are sent. Stopped in any way, the same command goes on: an update that was not sent is
    sent first, and a training resumes. Once this device has joined, the address alone is enough.
    """
    from fedpara_edge.cli.installed import require

    require("device")
    from device_runtime import progress_bar
    from device_runtime.agent.agent import run_agent
    from device_runtime.agent.link import read_link

    settings = AgentConfig(**config)
    TrainCall(**own)
    with progress_bar(drawing(sys.stderr)) as on_step:
        result = run_agent(
            read_link(url),
            data,
            state,
            settings,
            reading=Reading(**reading),
            client=client,
            ca=ca,
            own=own,
            seals=None if key is None else find_seals(key),
            on_event=_report,
            on_step=on_step,
        )
    text = (
        f"{result.client}: {counted(len(result.rounds), 'round')}, {counted(result.refused, 'update')} refused\n"
        f"sent {megabytes(result.sent_bytes)}, received {megabytes(result.received_bytes)}"
    )
    emit(asdict(result), text, as_json=json)


def _report(name: str, **fields: Any) -> None:
    """Log an event, and tell of it in a line."""
    event(name, **fields)
    if name in _LINES:
        note(filled(_LINES[name], **fields, number=fields.get("round", 0) + 1))


_LINES = {
    "joined": "{client} takes part at {server}",
    "tuned": "{message}",
    "training_finished": "round {number}: {examples:example}, {steps:step} in {seconds} s, loss {loss:.4f}",
    "training_failed": "round {number}: {message}",
    "update_sent": "round {number}: sent {bytes:byte}",
    "update_refused": "refused: {message}",
    "unreachable": "{message}; again in {again_in_seconds} s",
}
"""What is told of an event, by its name."""
