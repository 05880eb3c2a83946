"""Rounds a minute of a simulated federation against the same federation in plain torch, in one process.

    python benchmarks/simulating.py --clients 10 --clients 100 --json simulating.json

The federation is the arm `fedpara` of plans/fashion-mnist-cnn.toml, its images dealt to that many clients. The
simulation has its workers, files and codecs; plain torch has the clients' arrays in memory, its own threads, AdamW and
the mean of the state dicts, and nothing else. They take turns of `--rounds` rounds, of which the simulation's first,
which starts workers and opens sessions, and last, which is evaluated, don't count.

    training    the share of the workers' time that steps take
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch
from parts import keep_options, measure_parts
from plain import train_epoch
from torch import Tensor, nn

from export.build import factored_model
from fedpara_edge.cli.output import table
from fedpara_edge.simulation.data.clients import read_clients
from fedpara_edge.simulation.folder import RunFolder
from fedpara_edge.simulation.metrics import Journal
from fedpara_edge.simulation.plan.plan import Arm, Plan, read_plan
from fedpara_edge.simulation.runner import cores, simulate

PLAN = Path(__file__).parents[1] / "plans" / "fashion-mnist-cnn.toml"
ARM, SEED = "fedpara", 0
NEVER = 1000


def write_plan(folder: Path, clients: int, images: int, rounds: int) -> Path:
    """The plan for some clients and rounds, evaluated at its end alone."""
    changes = {
        'path = "..': f'path = "{PLAN.parents[1]}',
        "clients = 10": f"clients = {clients}",
        "min_examples = 64": f"min_examples = {max(1, min(64, images // clients // 4))}",
        "max_examples = 500": f"max_examples = {images // clients}",
        "rounds = 30": f"rounds = {rounds}",
        "evaluate_every = 2": f"evaluate_every = {NEVER}",  # but after the last round of a turn
        "seeds = [0, 1, 2]": f"seeds = [{SEED}]",
    }
    text = PLAN.read_text(encoding="utf-8")
    for before, after in changes.items():
        assert before in text, before
        text = text.replace(before, after)
    path = folder / "plan.toml"
    path.write_text(text, encoding="utf-8")
    return path


def simulated(plan: Path, run: Path, rounds: int) -> list[dict[str, float]]:
    """Seconds of the newest rounds but for the first and the last of them, and the share of training in each."""
    simulate(plan, run, arms=[ARM])
    found = Journal(RunFolder(run).metrics).of(ARM, SEED, "round")[-rounds + 1 : -1]
    return [
        {
            "seconds": event["seconds"],
            "training": event["train_seconds"] * event["participants"] / (event["seconds"] * cores()),
        }
        for event in found
    ]


class PlainTorch:
    """The same federation in plain torch.

    Args:
        plan: The plan.
        arm: Arm of the plan.
        run: Run folder, whose clients' data it takes.
    """

    def __init__(self, plan: Plan, arm: Arm, run: Path) -> None:
        self._plan, self._train, self._recipe = plan, arm.train, arm.model
        self._model: nn.Module = factored_model(arm.model).converted
        clients = read_clients(RunFolder(run).data(SEED))
        self._data = [self._arrays(clients.train(name)) for name in clients.names]
        self.state = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}

    @staticmethod
    def _arrays(folder: Path) -> tuple[Tensor, Tensor]:
        x, y = (torch.from_numpy(np.load(folder / f"{name}.npy")) for name in "xy")
        return x, y.long()

    def round(self) -> float:
        """Seconds of a round."""
        started, examples = time.perf_counter(), sum(len(y) for _, y in self._data)
        mean = {name: torch.zeros_like(tensor) for name, tensor in self.state.items()}
        for x, y in self._data:
            self._model.load_state_dict(self.state)
            self._epoch(x, y)
            for name, tensor in self._model.state_dict().items():
                mean[name] += tensor * (len(y) / examples)
        self.state = mean
        return time.perf_counter() - started

    def _epoch(self, x: Tensor, y: Tensor) -> None:
        options = {"lr": self._train.lr, "batch_size": self._train.batch_size}
        train_epoch(self._model, x, y, **options, mean=self._recipe.mean, std=self._recipe.std)


def measure(clients: int, images: int, rounds: int, turns: int) -> dict[str, Any]:
    """Median seconds of a round of both, and the share of training in the simulation's."""
    ours: list[dict[str, float]] = []
    theirs: list[float] = []
    with tempfile.TemporaryDirectory(prefix="simulating-") as name:
        folder, plain = Path(name), None
        for turn in range(1, turns + 1):
            path = write_plan(folder, clients, images, turn * rounds)
            ours += simulated(path, folder / "run", rounds)
            if plain is None:
                plan = read_plan(path)
                plain = PlainTorch(plan, plan.arm(ARM), folder / "run")
                plain.round()
            theirs += [plain.round() for _ in range(rounds - 2)]
    seconds = {"simulation": median(each["seconds"] for each in ours), "torch": median(theirs)}
    return {
        "clients": clients,
        "seconds": seconds,
        "training": median(each["training"] for each in ours),
        "torch_over_simulation": seconds["torch"] / seconds["simulation"],
    }


def report(results: Sequence[Mapping[str, Any]]) -> str:
    """Table of the results."""
    rows = [
        (
            result["clients"],
            *(f"{60 / result['seconds'][kind]:.1f}" for kind in ("simulation", "torch")),
            f"x {result['torch_over_simulation']:.2f}",
            f"{result['training']:.0%}",
        )
        for result in results
    ]
    header = ("clients", "simulation rounds/min", "torch rounds/min", "simulation/torch", "training")
    return f"{cores()} workers beside torch with {torch.get_num_threads()} threads\n\n{table(header, rows)}"


@click.command(help=__doc__)
@click.option("--clients", multiple=True, type=int, default=(10, 100), show_default=True)
@click.option("--images", default=5000, show_default=True, help="Most images of all clients together.")
@click.option("--rounds", default=3, show_default=True, help="Rounds in a turn, at least 3.")
@click.option("--turns", default=2, show_default=True)
@click.option("--json", "output", type=click.Path(path_type=Path), help="File for the numbers.")
@keep_options
def main(
    clients: tuple[int, ...], images: int, rounds: int, turns: int, output: Path | None, kept: Path | None, again: bool
) -> None:
    measured = measure_parts(
        {f"{count} clients": partial(measure, count, images, rounds, turns) for count in clients},
        lambda parts: report([*parts.values()]),
        settings={"images": images, "rounds": rounds, "turns": turns},
        kept=kept,
        again=again,
    )
    rows = [*measured.values()]
    click.echo(report(rows))
    if output is not None:
        output.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
