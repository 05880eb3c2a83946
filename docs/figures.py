"""Figures of the documentation, drawn from the committed results of the plans with the command that a user types.

python docs/figures.py      # prints each command, and replaces docs/figures/*.svg
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from fedpara_edge.cli import fedpara_edge

ROOT = Path(__file__).parents[1]
FOLDER = Path("docs") / "figures"
FOUR_ARMS = {
    "dense": "dense model, float32",
    "dense-uniform2": "dense model, uniform codec",
    "fedpara": "FedPara, float32",
    "fedpara-uniform2": "FedPara, uniform codec",
}
"""Arms of a figure that shows the effects of model and codec apart, with their labels."""


def _four_arms(run: str, title: str, **more: str) -> list[str]:
    arms = [f"--arm={name}={label}" for name, label in (FOUR_ARMS | more).items()]
    return [f"plans/results/{run}", "--figure=accuracy-by-bytes", *arms, "--target=0.86", f"--title={title}"]


FIGURES: Mapping[str, Sequence[str]] = {
    "fashion-mnist-bytes": _four_arms("fashion-mnist-bytes", "Fashion-MNIST on ten devices: accuracy over bytes"),
    "har-bytes": _four_arms(
        "har-bytes",
        "Activities from phone sensors: accuracy over bytes",
        **{"update-uniform1": "factored update, uniform codec"},
    ),
    "har-personal": ["plans/results/har-personal", "--figure=clients"],
    "speech-commands": [
        "plans/results/speech-commands",
        "--figure=accuracy-by-bytes",
        "--title=Spoken commands, tested on new speakers: accuracy over bytes",
    ],
    "shakespeare-lstm": ["plans/results/shakespeare-lstm", "--figure=accuracy-by-bytes"],
}
"""Figures by the name of their file, each with the arguments of `fedpara-edge report`."""


def command(name: str) -> list[str]:
    """Arguments of `fedpara-edge` that draw a figure into the current folder's `docs/figures`."""
    return ["report", *FIGURES[name], "--output", (FOLDER / f"{name}.svg").as_posix(), "--overwrite"]


@click.command()
def main() -> None:
    """Draw all figures again; to be run in the folder that has docs/ and plans/."""
    if not FOLDER.is_dir():
        raise click.UsageError(f"expected to be run in {ROOT}, found no folder {FOLDER}")
    for name in FIGURES:
        click.echo(shlex.join(["fedpara-edge", *command(name)]), err=True)
        fedpara_edge.main(command(name), standalone_mode=False)


if __name__ == "__main__":
    main()
