"""Training at multiples of the rate that `export` says is stable at the start: python benchmarks/stable_rates.py

For each model the rate, and the mean loss of the last ten of 60 steps of SGD at half of it, at it, twice and four times
it, of three seeds; `nan` where training diverged. Models and data are those of `benchmarks/rates.py`; with names of
models as arguments, those alone. Three minutes on a core.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from rates import SEEDS, TASKS, Data, Task, make, train
from torch import nn

from export.batches import Batches
from export.forward.outputs import OUTPUT, Chosen
from export.forward.preprocess import Argument, Deployed, Preprocessing
from export.stability import StableRates, stable_rates
from fedpara_edge.factors.factorization import Init
from fedpara_edge.formats.interface import ArraySpec, Head
from fedpara_edge.losses import find_loss

STEPS, MULTIPLES = 60, (0.5, 1, 2, 4)
NAMES = ("regression", "deep regression", "conv regression", "deep mlp", "wave", "mlp", "cnn", "har-transformer")
ARMS: tuple[tuple[str, Init | None, dict[str, float]], ...] = (
    ("factored", "composed", {}),
    ("factored, momentum 0.9", "composed", {"momentum": 0.9}),
    ("dense", None, {}),
)


def told(model: nn.Module, data: Data) -> StableRates | None:
    """What `export` says of a model, with the data as its example."""
    x, y = data
    inputs = ArraySpec("x", tuple(x.shape[1:]), "float32")
    with torch.no_grad():
        output = ArraySpec(OUTPUT, tuple(model.eval()(x[:2]).shape[1:]), "float32")
    numbers = y.is_floating_point()
    label = ArraySpec("y", tuple(y.shape[1:]), "float32" if numbers else "int64", None if numbers else output.shape[0])
    heads = [Head(output, label, find_loss("mse" if numbers else "cross_entropy"))]
    preprocessing = Preprocessing("float32", inputs.shape)
    examples = {"x": x.numpy(), "y": y.numpy()}
    batches = Batches(inputs=[inputs], preprocessings=[preprocessing], heads=heads, seed=0, examples=examples)
    return stable_rates(Deployed(model, [Argument(None, preprocessing)], Chosen()), None, heads, batches)


def row(task: Task, data: Data, init: Init | None, constants: dict[str, float]) -> list[str]:
    """Rates of the seeds, and losses at their multiples."""
    rates = [told(make(task, init, seed), data) for seed in range(SEEDS)]
    cells = [" ".join("none" if each is None else f"{each.factored:.2g}" for each in rates)]
    for multiple in MULTIPLES:
        losses = [
            "-"
            if each is None
            else f"{train(task, data, init, 'sgd', multiple * each.factored, seed, **constants):.2f}"
            for seed, each in enumerate(rates)
        ]
        cells.append(" ".join(losses))
    return cells


def main(names: Sequence[str]) -> None:
    """Print a row of a table for each model, factored and dense."""
    torch.set_num_threads(1)
    heading = " | ".join(f"{multiple:g} times" for multiple in MULTIPLES)
    print(f"| model | | rate | {heading} |\n|---|---|---|{'---|' * len(MULTIPLES)}")
    for name in names or NAMES:
        task = replace(TASKS[name], steps=STEPS)
        data = task.data()
        for arm, init, constants in ARMS:
            print(f"| {name} | {arm} | {' | '.join(row(task, data, init, constants))} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
