"""`fedpara-edge simulate`: the federations of a plan, all on this machine."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from fedpara_edge.cli.command import Command
from fedpara_edge.cli.log import event
from fedpara_edge.cli.options import PATH, options_of
from fedpara_edge.cli.output import emit, json_option, megabytes, note, table
from fedpara_edge.cli.streams import drawing, printable
from fedpara_edge.errors import FedparaError
from fedpara_edge.simulation.torchengine.choice import EngineChoice

if TYPE_CHECKING:
    from fedpara_edge.simulation.runner import Outcome

SECONDS_BETWEEN_LINES = 60.0
HEADER = ("arm", "seed", "parameters", "rounds", "accuracy", "loss", "up", "down")


@click.command("simulate", cls=Command, renamed={"--report-only": "the command report; type: fedpara-edge report RUN"})
@click.argument("plan", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="Run folder to make, or to go on in.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Processes, or clients at a time on a GPU.  [default: as many as cores]",
)
@click.option("--arm", multiple=True, metavar="NAME", help="Run this arm only; for several, repeat it.")
@options_of(EngineChoice, into="engine")
@json_option
def command(
    plan: Path, output: Path, workers: int | None, arm: tuple[str, ...], engine: Mapping[str, Any], json: bool
) -> None:
    """Run the federations of PLAN with the device runtime on real files, and report on them.

    With --engine torch, torch computes the steps in place of the device's engine, --device cuda on a GPU that all
    clients of a round share. With --engine flower, Flower's simulation engine has a SuperNode for each client, and ray
    the workers; the results are the same.

    Interrupted or killed, the same command goes on with the first round that was not done, to the same result; so does
    a run whose PLAN has more rounds, arms or seeds by now. What was measured is in OUTPUT/metrics.jsonl, and the report
    in OUTPUT/report.html; `fedpara-edge report` makes it again.
    """
    from fedpara_edge.cli.installed import require

    require("export")
    choice, nodes = EngineChoice(**engine), None
    if choice.engine == "flower":
        require("flower")
        from fedpara_edge.fleet.simulated import open_nodes

        nodes = open_nodes
    from fedpara_edge.report import write_report
    from fedpara_edge.simulation.runner import simulate

    started = time.monotonic()
    with _progress(sys.stderr) as (on_start, on_trained):
        outcomes = simulate(
            plan,
            output,
            workers=workers,
            arms=arm,
            engine=choice,
            nodes=nodes,
            on_start=on_start,
            on_trained=on_trained,
        )
    for outcome in outcomes:
        event("simulation_finished", **asdict(outcome))
    page: Path | None = None
    try:
        report = write_report(output)
        page = report.page
        if report.left_out is not None:
            note(report.left_out)
    except (FedparaError, OSError) as error:
        note(f"warning: {error}; the run is complete, and fedpara-edge report {output} makes its report")
    finally:  # what was run is told even if no report can be made of it
        result = {
            "run": output,
            "report": page,
            "seconds": time.monotonic() - started,
            "outcomes": [asdict(outcome) for outcome in outcomes],
        }
        lines = [*_lines(outcomes), *([] if page is None else [f"report: {page}"])]
        emit(result, "\n".join(lines), as_json=json)


def _lines(outcomes: list[Outcome]) -> list[str]:
    rows = [
        (
            outcome.arm,
            outcome.seed,
            f"{outcome.parameters:,}",
            outcome.rounds,
            "-" if outcome.accuracy is None else f"{outcome.accuracy:.2%}",
            "-" if outcome.loss is None else f"{outcome.loss:.4f}",
            megabytes(outcome.up_bytes),
            megabytes(outcome.down_bytes),
        )
        for outcome in outcomes
    ]
    diverged = [f"{o.arm}, seed {o.seed}: ended early: {o.diverged}" for o in outcomes if o.diverged]
    lost = [
        f"{o.arm}, seed {o.seed}: the loss of the last round is not finite"
        for o in outcomes
        if not o.diverged and o.loss is None
    ]
    return [table(HEADER, rows), *diverged, *lost] if rows else []


class _Lines:
    """What the bar tells, in lines for a log."""

    def __init__(self, length: int, stream: TextIO, clock: Callable[[], float]) -> None:
        self._length, self._stream, self._clock = length, stream, clock
        self._done = 0
        self._started = self._told = clock()

    def update(self, count: int, name: str) -> None:
        self._done += count
        now = self._clock()
        if now - self._told >= SECONDS_BETWEEN_LINES:
            self._told = now
            left = (now - self._started) / self._done * (self._length - self._done)
            click.echo(f"training {self._done}/{self._length}, {left / 60:.0f} min left: {name}", file=self._stream)


@contextmanager
def _progress(
    stream: TextIO, clock: Callable[[], float] = time.monotonic
) -> Iterator[tuple[Callable[[int], None], Callable[[str], None]]]:
    """The trainings done, with the time left: a bar on a terminal, elsewhere a line now and then."""
    bar: Any = None
    one_at_a_time = threading.Lock()
    with ExitStack() as shown:

        def on_start(trainings: int) -> None:
            nonlocal bar
            bar = _Lines(trainings, stream, clock)
            if stream.isatty():
                bar = click.progressbar(
                    length=trainings,
                    label="training",
                    file=drawing(stream),
                    show_pos=True,
                    item_show_func=lambda name: printable(name or ""),
                )
                shown.enter_context(bar)

        def on_trained(name: str) -> None:
            with one_at_a_time:
                bar.update(1, name)

        yield on_start, on_trained
