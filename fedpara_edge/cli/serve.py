"""`fedpara-edge serve`: a server for devices and phones."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from device_runtime.config import OWN, TrainCall
from fedpara_edge.aggregation.config import AggregateConfig
from fedpara_edge.algorithms import check_halves
from fedpara_edge.cli.command import Command
from fedpara_edge.cli.log import event
from fedpara_edge.cli.options import PATH, options_of
from fedpara_edge.cli.output import note
from fedpara_edge.serving.config import ServeConfig

if TYPE_CHECKING:
    from fedpara_edge.serving.running import Running

UNSERVED = ("privacy", "strict")
"""Options of `aggregate` that a server has no use for."""


@click.command("serve", cls=Command)
@click.argument("bundle", type=PATH)
@click.option("--state", type=PATH, required=True, help="The server's state folder, made if it is missing.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Port to listen on.")
@click.option("--url", help="Address under which devices reach the server.  [default: of host and port]")
@click.option("--page", type=PATH, help="Folder of the page for phones, as `make page` writes it.")
@options_of(ServeConfig, into="config")
@options_of(TrainCall, without=("algorithm", *OWN), into="train")
@click.option(
    "--client-algorithm",
    default="fedavg",
    metavar="NAME[:OPTION=VALUE,…]",
    show_default=True,
    help="Client algorithm, as --algorithm of `train`.",
)
@options_of(AggregateConfig, without=UNSERVED, into="aggregate")
def command(
    bundle: Path,
    state: Path,
    host: str,
    port: int,
    url: str | None,
    page: Path | None,
    config: Mapping[str, Any],
    train: Mapping[str, Any],
    client_algorithm: str,
    aggregate: Mapping[str, Any],
) -> None:
    """Serve BUNDLE to devices, which train it round by round, and put their updates together.

    Devices join by the link that is shown (`fedpara-edge device`). Rounds open and close by themselves. Everything is
    in the state folder: the same command goes on after any end of this one, and no update that was taken is lost or
    counts twice. Ctrl-C or SIGTERM ends it.
    """
    from fedpara_edge.cli.installed import require

    require("serve")
    from fedpara_edge.formats.bundle import open_bundle
    from fedpara_edge.serving.running import run_server

    call = TrainCall(**train, algorithm=client_algorithm)
    aggregation = AggregateConfig(**aggregate)
    check_halves(call.client_algorithm, aggregation.server_algorithm)
    serving = ServeConfig(**config)

    def show(running: Running) -> None:
        _show(running, url or f"http://{running.host}:{running.port}/", serving)

    run_server(
        open_bundle(bundle),
        state,
        aggregation,
        serving,
        {**train, "algorithm": client_algorithm},
        host=host,
        port=port,
        page=page,
        on_event=_report,
        on_ready=show,
    )


def _show(running: Running, url: str, config: ServeConfig) -> None:
    """Say where the server is, and how devices join."""
    token = running.tokens.make("join", expires=time.time() + 3600 * config.join_hours)
    link = f"{url.rstrip('/')}/#join={token}"
    event("serving", host=running.host, port=running.port, round=running.federation.number)
    note(f"round {running.federation.number + 1}, serving at {url}; for {config.join_hours:g} h devices join with")
    click.echo(link)


def _report(name: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Log an event, and tell of it in a line."""
    event(name, level=level, **fields)
    if name in _LINES:
        note(_LINES[name].format(**fields))


_LINES = {
    "device_joined": "{client} joined",
    "round_written": "{output}: round {round} from {accepted} updates ({examples} examples), {rejected} rejected, "
    "{stragglers} did not come back",
    "update_refused": "refused an update of {client}: {message}",
    "round_reopened": "round {round} goes on: {message}",
    "error": "Error: {message}",
}
"""What is told of an event, by its name."""
