"""`fedpara-edge fleet`: rounds on Flower, as a Flower app and on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from fedpara_edge.cli.command import Group
from fedpara_edge.cli.options import DATA, PATH, options_of
from fedpara_edge.cli.output import emit, json_option, megabytes, note
from fedpara_edge.errors import InputError, counted
from fedpara_edge.fleet.settings import FleetConfig, NodeConfig
from fedpara_edge.simulation.metrics import Event

COLUMNS = ("round", "devices", "failed", "accuracy", "loss", "up", "down", "seconds")
WIDTH = 9


@click.group("fleet", cls=Group)
def command() -> None:
    """Run the rounds of a plan on Flower, on this machine or on many."""


@command.command("init")
@click.argument("bundle", type=PATH)
@click.option("--plan", type=PATH, required=True, help="Plan of the rounds, as `simulate` takes it.")
@click.option("--arm", help="Arm of the plan.  [default: the only one]")
@click.option("-o", "--output", type=PATH, required=True, help="Folder of the Flower app to make.")
@options_of(FleetConfig, without=("bundle", "plan", "run", "arm"))
@json_option
def init(bundle: Path, plan: Path, arm: str | None, output: Path, options: Mapping[str, Any], json: bool) -> None:
    """Write a Flower app that runs the rounds of a plan for BUNDLE; `flwr run` takes it as it is."""
    from fedpara_edge.fleet.app import RUN, find_arm, write_app
    from fedpara_edge.simulation.plan.plan import read_plan

    rest: dict[str, Any] = {
        name: value.absolute() if isinstance(value, Path) else value for name, value in options.items()
    }
    config = FleetConfig(
        bundle=bundle.absolute(),
        plan=plan.absolute(),
        run=output.absolute() / RUN,
        arm=find_arm(read_plan(plan), arm).name,
        **rest,
    )
    write_app(output, config)
    text = f"{output}: a Flower app for arm {config.arm} of {plan}\nrun it here: fedpara-edge fleet up {output} -n 2"
    emit({"app": output, "arm": config.arm}, text, as_json=json)


@command.command("up")
@click.argument("app", type=PATH)
@click.option(
    "-n", "--nodes", type=click.IntRange(min=0), help="SuperNodes here.  [default: one for each --data, or 2]"
)
@click.option("--data", type=PATH, multiple=True, help="Data of a node, once for each.  [default: the plan's clients]")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port of the SuperLink.  [default: a free one]")
@click.option("--secure", is_flag=True, help="Use TLS, and let in nodes with known keys alone; keys are made.")
@click.option("--remote", type=click.IntRange(min=0), default=0, help="Devices elsewhere to wait for, with --host.")
@click.option("--host", default="", help="Name or address by which these reach this machine.")
@json_option
def up(
    app: Path,
    nodes: int | None,
    data: tuple[Path, ...],
    port: int,
    secure: bool,
    remote: int,
    host: str,
    json: bool,
) -> None:
    """Run the rounds of APP that are left, with a SuperLink and SuperNodes on this machine.

    Interrupted or killed, the same command goes on after the last round that was done, and nothing stays behind. For
    devices elsewhere, it says what to type there.
    """
    from fedpara_edge.cli.installed import require

    require("fleet")
    from fedpara_edge.fleet.up import run_up

    if bool(remote) != bool(host):
        found = "it without" if host else "none"
        raise InputError(f"expected with --remote and only then, found {found}; give both, or none", key="host")
    here = nodes if nodes is not None else len(data) or (0 if remote else 2)
    if not here + remote:
        raise InputError("expected at least 1 here or elsewhere, found none", key="nodes")
    table = _Table(quiet=json)
    outcome = run_up(
        app,
        nodes=here,
        data=data,
        port=port,
        secure=secure,
        remote=remote,
        host=host,
        on_round=table.row,
        on_line=note,
    )
    result = {"status": outcome.status, "weights": outcome.weights, "rounds": list(outcome.rounds)}
    emit(result, f"{outcome.weights}: {counted(len(outcome.rounds), 'round')}, {outcome.status}", as_json=json)


@command.command("node")
@click.argument("address", metavar="HOST:PORT")
@click.option("--data", type=PATH, required=True, help=DATA)
@click.option("--state", type=PATH, required=True, help="The device's state folder; what comes is kept there too.")
@options_of(NodeConfig, without=("data", "state"))
@click.option("--ca", type=PATH, metavar="FILE", help="Certificate that the server's is signed with, for TLS.")
@click.option("--auth", type=PATH, metavar="FILE", help="Private key of this node, for a server that knows its nodes.")
def node(address: str, data: Path, state: Path, options: Mapping[str, Any], ca: Path | None, auth: Path | None) -> None:
    """Train for the server at HOST:PORT whenever it calls, until Ctrl-C.

    A SuperNode of Flower, in less memory than its own command needs, and with shorter rounds.
    """
    from fedpara_edge.cli.installed import require

    require("fleet")
    from fedpara_edge.fleet.node import run_node

    config = NodeConfig(data=data.absolute(), state=state.absolute(), **options)
    run_node(address, config, ca=ca, auth=auth, on_start=lambda: note(f"a node of {address}; Ctrl-C ends it"))


class _Table:
    """A table with a row for each round, as it is done.

    Args:
        quiet: Whether to show nothing.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._quiet, self._rows = quiet, 0

    def row(self, event: Event) -> None:
        """Show a round."""
        if self._quiet:
            return
        if not self._rows:
            print("".join(name.rjust(WIDTH) for name in COLUMNS), flush=True)
        self._rows += 1
        accuracy, loss = event["accuracy"], event["loss"]
        cells = (
            event["round"],
            event["participants"],
            event["rejected"],
            "-" if accuracy is None else f"{accuracy:.2%}",
            f"{event['train_loss'] if loss is None else loss:.4f}",
            megabytes(event["up_bytes"]),
            megabytes(event["down_bytes"]),
            f"{event['seconds']:.1f}",
        )
        print("".join(str(cell).rjust(WIDTH) for cell in cells), flush=True)
