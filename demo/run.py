"""The demo: one federation on real images, run by the very commands a user types, for three kinds of model.

Ten devices share 10,000 Fashion-MNIST images, dealt by Dirichlet(0.5); each round every device trains locally and sends
an update, the server aggregates, and the result is evaluated on 2,000 other images. The table compares FedPara (γ 0.1)
with the dense original and with the low-rank model of the same size.

    python demo/run.py                  # all of it, under 4 minutes on two cores
    python demo/run.py --rounds 3       # a shorter one
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from fedpara_edge.cli.output import table
from fedpara_edge.demo import IMAGES
from fedpara_edge.simulation.data.partition import dirichlet

ARMS = {"fedpara": "FedPara, γ 0.1", "dense": "dense original", "lowrank": "low-rank, same size"}
CLIENTS, ALPHA, LEAST = 10, 0.5, 64
MARK = "written-by-the-demo"


def run(arguments: list[Any], folder: Path, *, show: bool) -> dict[str, Any]:
    """Run `fedpara-edge` with the arguments in a folder, as a user would; its JSON result."""
    words = [str(argument) for argument in arguments]
    if show:
        click.secho(f"$ fedpara-edge {' '.join(words)}", fg="blue")
    command = [sys.executable, "-m", "fedpara_edge", *words, "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise click.ClickException(f"fedpara-edge {words[0]} ended with {done.returncode}: {done.stderr.strip()}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def deal(folder: Path, seed: int) -> None:
    """Write the devices' and the test data."""
    data = np.load(IMAGES)
    for client, rows in enumerate(dirichlet(data["y_train"], clients=CLIENTS, alpha=ALPHA, seed=seed, least=LEAST)):
        np.savez(folder / f"device-{client}.npz", x=data["x_train"][rows], y=data["y_train"][rows])
    np.savez(folder / "test.npz", x=data["x_test"], y=data["y_test"])


@dataclass(frozen=True)
class Setting:
    """What all arms have in common."""

    folder: Path
    model: str
    rounds: int
    epochs: int
    lr: float
    seed: int


def train(setting: Setting, kind: str, number: int, client: int, weights: str) -> str:
    """One device's part in a round; the name of its update."""
    update = f"{kind}/update-{number}-{client}.safetensors"
    files = [f"{kind}/bundle", "--data", f"device-{client}.npz", "--weights", weights, "-o", update]
    device = ["--client", f"device-{client}", "--state", f"{kind}/state-{client}", "--threads", 1]
    recipe = ["--epochs", setting.epochs, "--batch-size", 16, "--lr", setting.lr, "--lr-decay", 0.9]
    show = number == 1 and client == 0
    run(["train", *files, *device, *recipe, "--seed", setting.seed + client], setting.folder, show=show)
    return update


def federate(setting: Setting, kind: str) -> dict[str, Any]:
    """One arm: export, then rounds of train, aggregate, evaluate. Returns its row of the table."""
    folder, megabytes, accuracy = setting.folder, 0.0, 0.0
    model = ["--kind", kind, "--gamma", 0.1, "--mean", 0.286, "--std", 0.353, "--seed", setting.seed]
    exported = run(["export", setting.model, *model, "-o", f"{kind}/bundle"], folder, show=True)
    weights = f"{kind}/bundle/weights.safetensors"
    for number in range(1, setting.rounds + 1):
        started = time.monotonic()
        with ThreadPoolExecutor(2) as pool:
            trained = [pool.submit(train, setting, kind, number, client, weights) for client in range(CLIENTS)]
            updates = [future.result() for future in trained]
        following = f"{kind}/round-{number}.safetensors"
        aggregation = ["aggregate", *updates, "--weights", weights, "-o", following]
        result = run(aggregation, folder, show=number == 1)
        megabytes = (result["received_bytes"] + CLIENTS * (folder / weights).stat().st_size) / 1e6
        weights = following
        evaluation = ["evaluate", f"{kind}/bundle", "--weights", weights, "--data", "test.npz"]
        accuracy = run(evaluation, folder, show=number == 1)["accuracy"]
        click.echo(f"  {kind} round {number}: accuracy {accuracy:.1%}, {time.monotonic() - started:.1f} s")
    return {
        "kind": kind,
        "parameters": exported["shared_parameters"],
        "accuracy": accuracy,
        "megabytes_per_round": megabytes,
    }


@click.command()
@click.option("--model", default="cnn", show_default=True)
@click.option("--rounds", default=6, show_default=True)
@click.option("--epochs", default=1, show_default=True)
@click.option("--lr", default=0.1, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), default=Path("demo-run"), show_default=True)
def main(model: str, rounds: int, epochs: int, lr: float, seed: int, folder: Path) -> None:
    """Run the three arms one after the other and print the table."""
    started = time.monotonic()
    if folder.exists() and not (folder / MARK).exists():
        raise click.ClickException(f"{folder}: expected a new folder or one of an earlier demo, found another; move it")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARK).touch()
    deal(folder, seed)
    setting = Setting(folder, model, rounds, epochs, lr, seed)
    rows = []
    for kind in ARMS:
        (folder / kind).mkdir()
        rows.append(federate(setting, kind))
    dense = next(row for row in rows if row["kind"] == "dense")
    header = ("model", "parameters", "accuracy", "MB a round", "of dense")
    cells = [
        (
            ARMS[row["kind"]],
            f"{row['parameters']:,}",
            f"{row['accuracy']:.1%}",
            f"{row['megabytes_per_round']:.2f}",
            f"{row['megabytes_per_round'] / dense['megabytes_per_round']:.1%}",
        )
        for row in rows
    ]
    federation = f"{CLIENTS} devices, Dirichlet({ALPHA}), {rounds} rounds, local epochs {epochs}, seed {seed}"
    click.echo(f"\n{model} on Fashion-MNIST, {federation}:\n")
    click.echo(table(header, cells))
    click.echo(f"\nMB a round: updates up and weights down, all devices. {time.monotonic() - started:.0f} s in all.")
    (folder / "result.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
