"""The demo: one federation on real images for three kinds of model, run by the very commands that a user types.

Ten devices share 10,000 Fashion-MNIST images, dealt by Dirichlet(0.5); each round every device trains locally and sends
an update, the server aggregates, and the result is evaluated on 2,000 other images. FedPara (γ 0.1) is compared with
the dense original and with the low-rank model of the same size. What a command prints with `--json` is all that is read
of it, so that what works here works when typed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedpara_edge.demo import IMAGES
from fedpara_edge.errors import FedparaError, InputError
from fedpara_edge.options import check, option

KINDS = {"fedpara": "FedPara, γ 0.1", "dense": "dense original", "lowrank": "low-rank, same size"}
"""Kinds of model that are compared, and how a table calls them."""
RATES = {"cnn": 0.1, "mlp": 0.05}
"""Models, each with a learning rate at which all three kinds of it train."""
ALPHA, MIN_EXAMPLES = 0.5, 64
MARK = "written-by-the-demo"
RESULT = "result.json"


@dataclass(frozen=True, kw_only=True)
class Federation:
    """What all kinds of model have in common.

    Args:
        folder: Folder in which every command runs.
        model: Model of the zoo.
        clients: Number of devices.
        rounds: Rounds of each federation.
        epochs: Local epochs of a round.
        lr: Learning rate of the first round; None for one at which all three kinds of the model train.
        seed: Seed of the split, the initial weights and the order of the rows.

    Raises:
        InputError: A value is out of its range.
    """

    folder: Path
    model: str = option("cnn", choices=tuple(RATES), help="Model of the zoo.")
    clients: int = option(10, minimum=1, help="Number of devices.")
    rounds: int = option(6, minimum=1, help="Rounds of each federation.")
    epochs: int = option(1, minimum=1, help="Local epochs of a round.")
    lr: float | None = option(
        None, above=0, unset="0.1 for cnn, 0.05 for mlp", help="Learning rate of the first round."
    )
    seed: int = option(0, minimum=0, help="Seed of everything random.")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one kind of model came to.

    Args:
        kind: Kind of the model's factors.
        parameters: Number of parameters that travel.
        accuracy: Accuracy on the test images after the last round.
        megabytes_per_round: Updates up and weights down, of all devices, in MB (10^6 bytes).
    """

    kind: str
    parameters: int
    accuracy: float
    megabytes_per_round: float


OnCommand = Callable[[Sequence[str]], None]
"""Function called with the words of a command before it runs, once for each kind of command and model."""
OnRound = Callable[[str, int, float, float], None]
"""Function called after each round with kind, number of the round, accuracy and seconds."""


def run_demo(
    federation: Federation, on_command: OnCommand, on_round: OnRound, *, kinds: Sequence[str] = tuple(KINDS)
) -> list[Outcome]:
    """Deal the images and run the federation for each kind of model, one after the other.

    The folder is made anew if it is one of an earlier demo; the outcomes are in its `result.json` as well.

    Raises:
        InputError: The folder exists and no demo has written it.
        FedparaError: A command failed.
    """
    folder = federation.folder
    if folder.exists() and not (folder / MARK).exists():
        raise InputError(f"{folder}: expected a new folder or one of an earlier demo, found another; move it")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARK).touch()
    _deal(federation)
    outcomes = [_federate(federation, kind, on_command, on_round) for kind in kinds]
    rows = [asdict(outcome) for outcome in outcomes]
    (folder / RESULT).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return outcomes


def _deal(federation: Federation) -> None:
    """Write the devices' and the test images."""
    arrays = ["--train", "x_train,y_train", "--test", "x_test,y_test"]
    how = ["--split", "dirichlet", "--clients", federation.clients, "--alpha", ALPHA, "--min-examples", MIN_EXAMPLES]
    _call(["split", IMAGES, *arrays, *how, "--seed", federation.seed, "-o", "data"], federation.folder)


def _federate(federation: Federation, kind: str, on_command: OnCommand, on_round: OnRound) -> Outcome:
    """Export a model of one kind, then rounds of train, aggregate, evaluate."""

    def call(words: Sequence[Any], *, show: bool = True) -> dict[str, Any]:
        if show:
            on_command([str(word) for word in words])
        return _call(words, folder)

    folder, megabytes, accuracy = federation.folder, 0.0, 0.0
    lr = RATES[federation.model] if federation.lr is None else federation.lr
    (folder / kind).mkdir()
    model = ["--kind", kind, "--gamma", 0.1, "--mean", 0.286, "--std", 0.353, "--seed", federation.seed]
    exported = call(["export", federation.model, *model, "-o", f"{kind}/bundle"])
    weights = f"{kind}/bundle/weights.safetensors"
    devices = sorted(path.stem for path in (folder / "data" / "train").iterdir())

    def train(client: int) -> str:
        update = f"{kind}/update-{number}-{client}.safetensors"
        files = [f"{kind}/bundle", "--data", f"data/train/{devices[client]}.npz", "--weights", weights, "-o", update]
        device = ["--client", f"device-{client}", "--state", f"{kind}/state-{client}", "--threads", 1]
        recipe = ["--epochs", federation.epochs, "--batch-size", 16, "--lr", lr, "--lr-decay", 0.9]
        words = ["train", *files, *device, *recipe, "--seed", federation.seed + client]
        call(words, show=number == 1 and client == 0)
        return update

    for number in range(1, federation.rounds + 1):
        started = time.monotonic()
        with ThreadPoolExecutor(2) as pool:
            updates = list(pool.map(train, range(len(devices))))
        following = f"{kind}/round-{number}.safetensors"
        result = call(["aggregate", *updates, "--weights", weights, "-o", following], show=number == 1)
        megabytes = (result["received_bytes"] + len(devices) * (folder / weights).stat().st_size) / 1e6
        weights = following
        evaluation = ["evaluate", f"{kind}/bundle", "--weights", weights, "--data", "data/test.npz"]
        accuracy = call(evaluation, show=number == 1)["accuracy"]
        on_round(kind, number, accuracy, time.monotonic() - started)
    return Outcome(
        kind=kind, parameters=exported["shared_parameters"], accuracy=accuracy, megabytes_per_round=megabytes
    )


def _call(words: Sequence[Any], folder: Path) -> dict[str, Any]:
    """Run `fedpara-edge` in a folder; its JSON result."""
    # -P: nothing that lies in the folder is taken for a module.
    command = [sys.executable, "-P", "-m", "fedpara_edge", *(str(word) for word in words), "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise FedparaError(
            f"fedpara-edge {words[0]}: expected it to end with 0, found {done.returncode}: {done.stderr}"
        )
    result: dict[str, Any] = json.loads(done.stdout)
    return result
