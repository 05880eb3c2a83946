"""`fedpara-edge demo`: FedPara, the dense original and low-rank side by side on real images."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from fedpara_edge.cli.command import Command
from fedpara_edge.cli.options import PATH, options_of
from fedpara_edge.cli.output import emit, json_option, overwrite_option, table
from fedpara_edge.cli.streams import drawing, printable
from fedpara_edge.demo import IMAGES
from fedpara_edge.demo.federation import ALPHA, KINDS, Federation, Outcome, run_demo
from fedpara_edge.errors import counted
from fedpara_edge.storage.atomic import check_output, replacing_file

HEADER = ("model", "parameters", "accuracy", "MB a round", "of dense")


@click.command("demo", cls=Command)
@click.option("-o", "--output", type=PATH, default=Path("demo-run"), show_default=True, help="Folder for all files.")
@options_of(Federation, without=("folder",))
@click.option("--images", type=PATH, help="Run nothing; write the images, x_train to y_test, to this .npz.")
@overwrite_option
@json_option
def command(output: Path, options: Mapping[str, Any], images: Path | None, overwrite: bool, json: bool) -> None:
    """Run one federation on real images for three kinds of model and print how they compare.

    Ten devices train on 10,000 images of Fashion-MNIST, dealt unevenly, with the commands that you would type; the
    first of each are shown. It takes under 4 minutes on two cores, and less with fewer --rounds.
    """
    if images is not None:
        _write_images(images, overwrite=overwrite, as_json=json)
        return
    from fedpara_edge.cli.installed import require

    require("export")
    started = time.monotonic()
    federation = Federation(folder=output, **options)
    silent = json and not sys.stderr.isatty()

    def tell(line: str, colour: str | None = None) -> None:
        if not silent:
            click.secho(printable(line), fg=colour, file=drawing(sys.stderr if json else sys.stdout))

    outcomes = run_demo(
        federation,
        lambda words: tell(f"$ fedpara-edge {' '.join(words)}", "blue"),
        lambda kind, number, accuracy, seconds: tell(
            f"  {kind} round {number}: accuracy {accuracy:.1%}, {seconds:.1f} s"
        ),
    )
    seconds = time.monotonic() - started
    result = {"folder": output, "seconds": seconds, "outcomes": [asdict(outcome) for outcome in outcomes]}
    emit(result, summary(federation, outcomes, seconds=seconds), as_json=json)


def summary(federation: Federation, outcomes: Sequence[Outcome], *, seconds: float) -> str:
    """The table of the outcomes, between what was run and how long it took."""
    dense = next(outcome.megabytes_per_round for outcome in outcomes if outcome.kind == "dense")
    rows = [
        (
            KINDS[outcome.kind],
            f"{outcome.parameters:,}",
            f"{outcome.accuracy:.1%}",
            f"{outcome.megabytes_per_round:.2f}",
            f"{outcome.megabytes_per_round / dense:.1%}",
        )
        for outcome in outcomes
    ]
    about = (
        f"{federation.model} on Fashion-MNIST, {counted(federation.clients, 'device')}, Dirichlet({ALPHA}), "
        f"{counted(federation.rounds, 'round')}, local epochs {federation.epochs}, seed {federation.seed}:"
    )
    end = f"MB a round: updates up and weights down, all devices. {seconds:.0f} s in all."
    return f"\n{about}\n\n{table(HEADER, rows)}\n\n{end}"


def _write_images(path: Path, *, overwrite: bool, as_json: bool) -> None:
    check_output(path, overwrite=overwrite)
    with replacing_file(path) as temporary:
        temporary.write_bytes(IMAGES.read_bytes())
    result = {"images": path, "x_train": 10_000, "x_test": 2_000}
    emit(result, f"{path}: Fashion-MNIST, 10000 images to train on, 2000 to test", as_json=as_json)
