"""A plan of tiny federations, for tests: its data, its file with some changes, and what a run of it measured."""

import json
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np

PLAN = """
name = "tiny"
rounds = 2
seeds = [4]
participants = 2
[data]
path = "data.npz"
split = "iid"
clients = 3
test = ["x_test", "y_test"]
[model]
name = "mlp"
classes = 3
input_shape = [1, 4, 4]
[train]
batch_size = 8
lr = 0.1
lr_decay = 0.9
[arms.dense]
model.kind = "dense"
[arms.small]
model.gamma = 0.5
train.codec = "int8"
[arms.alone]
model.gamma = 0.5
local_only = true
"""
ARMS = {"dense": 0, "small": 0, "alone": 1}
"""The arms by whether they are local."""
SECONDS = ("seconds", "train_seconds")


class AtOnce(Executor):
    """Does in this process and at once what is submitted."""

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:  # noqa: BLE001
            future.set_exception(error)
        return future


def write_data(place: Path) -> None:
    generator = np.random.default_rng(0)
    y = generator.integers(0, 3, 130)
    x = (60 * y[:, None, None] + generator.integers(0, 100, (130, 4, 4))).astype(np.uint8)
    np.savez(place / "data.npz", x=x[:100], y=y[:100], x_test=x[100:], y_test=y[100:], writer=np.arange(100) % 4)


def write_plan(place: Path, *changes: tuple[str, str], more: str = "") -> Path:
    text = PLAN
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    (place / "plan.toml").write_text(text + more)
    if not (place / "data.npz").exists():
        write_data(place)
    return place / "plan.toml"


def measured(run: Path) -> list[dict[str, Any]]:
    """All metrics but for seconds."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in SECONDS} for line in lines]
