"""`fedpara-edge advise`: the cheapest setting of a federation for an accuracy."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedpara_edge.cli.command import Command
from fedpara_edge.cli.options import PATH, options_of
from fedpara_edge.cli.output import emit, json_option, megabytes, table

if TYPE_CHECKING:
    from fedpara_edge.advising.advice import Advice, Finalist

from fedpara_edge.advising.choices import Choices
from fedpara_edge.errors import counted

HEADER = ("setting", "accuracy", "bytes a round", "bytes to reach", "dense over these")


@click.command("advise", cls=Command)
@click.argument("plan", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="Folder of the search, to make or to go on in.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes.  [default: as many as cores]")
@options_of(Choices, into="choices")
@json_option
def command(plan: Path, output: Path, workers: int | None, choices: Mapping[str, Any], json: bool) -> None:
    """Find the cheapest kind, γ, codec and learning rate for the data and the model of PLAN.

    Tries them in short federations, and those that promise most for all rounds of PLAN, whose own arms are left aside.
    The cheapest sends the fewest bytes until it is within --points of the dense model's best accuracy. It is written
    into OUTPUT/advised.toml, a plan for `simulate` with the dense model beside it, for the seeds of PLAN, of which the
    search uses none. Interrupted, the same command goes on.
    """
    from fedpara_edge.cli.installed import require

    require("export")
    from fedpara_edge.advising.advice import advise

    started = time.monotonic()

    def on_rung(what: str, settings: int, rounds: int) -> None:
        click.echo(f"{what}: {counted(settings, 'setting')}, {counted(rounds, 'round')}", file=sys.stderr)

    advice = advise(plan, output, choices=Choices(**choices), workers=workers, on_rung=on_rung)
    result = {
        "target": advice.target,
        "finalists": [asdict(finalist) for finalist in advice.finalists],
        "plan": advice.plan,
        "seconds": time.monotonic() - started,
    }
    emit(result, "\n".join(_lines(advice)), as_json=json)


def _lines(advice: Advice) -> list[str]:
    best, target = advice.best, f"{advice.target:.1%}"
    if advice.plan is None:
        advised = f"advised: {best.setting}: nothing cheaper reached {target}; allow more --points, or more rounds"
    else:
        fewer = "" if best.ratio is None else f", with {best.ratio:.3g} times fewer bytes than dense in float32"
        judge = f"fedpara-edge simulate {advice.plan} -o RUN/"
        advised = f"advised: {best.setting}: reaches {target}{fewer}; judge it by: {judge}"
    return [table(HEADER, [_row(finalist) for finalist in advice.finalists]), advised]


def _row(finalist: Finalist) -> tuple[str, ...]:
    return (
        str(finalist.setting),
        f"{finalist.accuracy:.1%}",
        megabytes(finalist.round_bytes),
        "-" if finalist.bytes is None else megabytes(finalist.bytes),
        "-" if finalist.ratio is None else f"{finalist.ratio:.3g}",
    )
