"""Linear layers composed and contracted: a training step of the layer alone, measured and as the exporter predicts it.

Each layer is exported both ways and verified, for the engine onnxruntime. It stands inside a network: the gradient of
its input is computed as well, which the first layer of a model does not need (`--first`). Both ways take turns, and
each figure is a median. The prediction is `export.forward.contraction.step_cost`, which leaves out the cost that every
step has; the choice is that of `export.forward.contraction.contract_layers`.

    python benchmarks/contraction.py --layers 256x784 --ranks 16 --json contraction.json
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from device import median_ms
from parts import keep_options, measure_parts
from torch import Tensor, nn

from device_runtime import open_engine
from export import export_bundle
from export.forward.contraction import contract_layers, step_cost
from fedpara_edge.cli.output import table
from fedpara_edge.factors.layout import LayerSpec
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.nn import Linear

METHODS = {"composed": False, "contracted": True}
RATE = 1e-6
"""Learning rate, small enough for the weights to stay as they are."""


class FixedLinear(Linear):
    """Linear layer that is computed one way, whatever the exporter chooses."""

    def __init__(self, spec: LayerSpec, *, contracted: bool) -> None:
        self._fixed = contracted
        super().__init__(*spec.shape[::-1], kind=spec.kind, rank=spec.rank)

    @property
    def contracted(self) -> bool:
        return self._fixed

    @contracted.setter
    def contracted(self, chosen: bool) -> None:
        pass


class Shift(nn.Module):
    """Layer x + b, which makes the layer after it compute the gradient of its input."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


def export(layer: Linear, folder: Path, *, first: bool) -> Bundle:
    """Bundle that trains the layer, as the first of a network or inside one."""
    size = layer.in_features
    model = nn.Sequential(nn.Identity() if first else Shift(size), layer)
    options = ExportConfig(
        name="layer", input_shape=(size,), input_dtype="float32", loss="mse", engines=("onnxruntime",)
    )
    return export_bundle(model, folder, options)[0]


def measure(
    spec: LayerSpec, folder: Path, *, batches: Sequence[int], first: bool, threads: int, repetitions: int
) -> Iterator[dict[str, Any]]:
    """Measured and predicted milliseconds of both ways for each batch, and the exporter's choice."""
    engines = {}
    for way, contracted in METHODS.items():
        torch.manual_seed(0)
        bundle = export(FixedLinear(spec, contracted=contracted), folder / way, first=first)
        engines[way] = open_engine(bundle, "onnxruntime", threads=threads)
    outputs, inputs = spec.shape
    free = Linear(inputs, outputs, kind=spec.kind, rank=spec.rank)
    generator = np.random.default_rng(0)
    for batch in batches:
        x, y = (generator.standard_normal((batch, size), np.float32) for size in (inputs, outputs))
        steps = {way: partial(engine.step, x, y, learning_rate=RATE, seed=0) for way, engine in engines.items()}
        ms = median_ms(steps, repetitions)
        chosen = "contracted" if contract_layers(free, [torch.zeros(2, inputs)], batch) else "composed"
        yield {
            "kind": spec.kind,
            "shape": spec.shape,
            "rank": spec.rank,
            "batch": batch,
            "ms": ms,
            "predicted_ms": {way: step_cost(spec, batch, contracted=value) / 1e6 for way, value in METHODS.items()},
            "chosen": chosen,
            "chosen_over_faster": ms[chosen] / min(ms.values()),
        }


def report(results: Mapping[str, Any]) -> str:
    """Table of the results, and the quality of the choices."""
    rows = results["rows"]
    cells = [
        (
            row["kind"],
            "x".join(map(str, row["shape"])),
            row["rank"],
            row["batch"],
            *(f"{row[times][way]:.3f}" for times in ("ms", "predicted_ms") for way in METHODS),
            row["chosen"],
            "yes" if row["chosen_over_faster"] == 1 else "no",
            f"{row['chosen_over_faster']:.2f}",
        )
        for row in rows
    ]
    times = (*METHODS, *(f"{way}, predicted" for way in METHODS))
    header = ("kind", "layer", "R", "batch", *times, "chosen", "right", "costs")
    losses = [row["chosen_over_faster"] for row in rows]
    fastest = sum(min(row["ms"].values()) for row in rows)
    sums = {"as chosen": sum(row["ms"][row["chosen"]] for row in rows)}
    sums |= {f"always {way}": sum(row["ms"][way] for row in rows) for way in METHODS}
    where = "first of a network" if results["first"] else "inside a network"
    return (
        f"milliseconds a step of a linear layer, {where}, at {results['threads']} threads (medians)\n\n"
        f"{table(header, cells)}\n\n"
        f"the faster way is chosen in {losses.count(1)} of {len(rows)} cases; the worst choice takes {max(losses):.2f} "
        "times the faster\nall steps together, over the faster way for each: "
        f"{', '.join(f'{name} {total / fastest:.2f}' for name, total in sums.items())}"
    )


@click.command()
@click.option(
    "--layers", default="256x784,512x512,128x128", show_default=True, help="Shapes of the layers, outputs by inputs."
)
@click.option("--ranks", default="8,16,24", show_default=True)
@click.option("--kinds", default="fedpara,lowrank", show_default=True)
@click.option("--batches", default="1,8,32,128", show_default=True)
@click.option("--first", is_flag=True, help="Leave out the gradient of the layer's input.")
@click.option("--threads", default=1, show_default=True)
@click.option("--repetitions", default=7, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@keep_options
def main(
    layers: str,
    ranks: str,
    kinds: str,
    batches: str,
    first: bool,
    threads: int,
    repetitions: int,
    json_file: Path | None,
    kept: Path | None,
    again: bool,
) -> None:
    """Measure, print the table, and write it as JSON."""
    settings = {"first": first, "threads": threads}

    def measure_layer(kind: Any, shape: str, rank: int) -> list[dict[str, Any]]:
        size = tuple(_numbers(shape, "x"))
        spec = LayerSpec(name="layer", operator="linear", kind=kind, form="matrix", shape=size, rank=rank)
        with tempfile.TemporaryDirectory() as name:
            return [*measure(spec, Path(name), batches=_numbers(batches), repetitions=repetitions, **settings)]

    def all_of(parts: Mapping[str, Any]) -> dict[str, Any]:
        return {**settings, "rows": [*chain.from_iterable(parts.values())]}

    measured = measure_parts(
        {
            f"{kind} {shape}, rank {rank}": partial(measure_layer, kind, shape, rank)
            for kind, shape, rank in product(kinds.split(","), layers.split(","), _numbers(ranks))
        },
        lambda parts: report(all_of(parts)),
        settings={**settings, "batches": batches, "repetitions": repetitions},
        kept=kept,
        again=again,
    )
    results = all_of(measured)
    click.echo(report(results))
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _numbers(text: str, separator: str = ",") -> list[int]:
    return [int(part) for part in text.split(separator)]


if __name__ == "__main__":
    main()
