"""`fedpara-edge evaluate`: loss and accuracy of weights on data."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from fedpara_edge.cli.command import Command
from fedpara_edge.cli.output import emit, json_option, table

FOLDER_OR_FILE = click.Path(path_type=Path)


@click.command("evaluate", cls=Command)
@click.argument("bundle", type=FOLDER_OR_FILE)
@click.option("--weights", type=FOLDER_OR_FILE, help="Weights to evaluate.  [default: the bundle's]")
@click.option(
    "--data",
    type=FOLDER_OR_FILE,
    required=True,
    multiple=True,
    help=".npz with x and y, or a folder with x.npy and y.npy. Several for several clients.",
)
@click.option(
    "--state",
    type=FOLDER_OR_FILE,
    multiple=True,
    help="State folder with the personal tensors. With several clients, one for each, in the same order.",
)
@click.option("--batch-size", type=int, default=256, show_default=True)
@click.option("--engine", default="auto", show_default=True, help="onnxruntime, ort-training, or the faster there is.")
@click.option("--threads", type=int, help="Of the engine.  [default: as many as cores]")
@json_option
def command(
    bundle: Path,
    weights: Path | None,
    data: tuple[Path, ...],
    state: tuple[Path, ...],
    batch_size: int,
    engine: str,
    threads: int | None,
    json: bool,
) -> None:
    """Evaluate weights of BUNDLE on data, without gradients and without dropout.

    With several --data, each is a client of its own: they are told one by one, together, and how they are distributed.
    """
    from fedpara_edge.cli.installed import require

    require("device")
    from device_runtime import open_engine
    from device_runtime.clients import distribution, evaluate_clients, overall, pair_clients
    from fedpara_edge.formats.bundle import WEIGHTS, open_bundle

    clients = pair_clients(data, state)
    opened = open_bundle(bundle)
    running = open_engine(opened, engine, threads=threads)
    found = evaluate_clients(running, weights or opened.file(WEIGHTS), clients, batch_size)
    together = overall(found)
    accuracy = "" if together.accuracy is None else f"accuracy {together.accuracy:.2%}, "
    text = f"{accuracy}loss {together.loss:.4f} on {together.examples} examples"
    if opened.manifest.layout.with_role("personal") and not state:
        text += ", with the personal tensors as exported; pass --state for a device's own"
    result: dict[str, Any] = asdict(together)
    if len(clients) > 1:
        measure = "loss" if together.accuracy is None else "accuracy"
        spread = distribution([getattr(each, measure) for each in found])
        result["clients"] = [
            {"data": str(client.data), "state": client.state and str(client.state), **asdict(each)}
            for client, each in zip(clients, found, strict=True)
        ]
        result["distribution"] = {"of": measure, **asdict(spread)}
        least, first, median, third, largest = (f"{value:.4f}" for value in spread.quartiles)
        rows = [(str(c.data), f"{getattr(e, measure):.4f}", e.examples) for c, e in zip(clients, found, strict=True)]
        text = (
            f"{table(('client', measure, 'examples'), rows)}\n\n{text}\n{measure} of {len(clients)} clients: "
            f"mean {spread.mean:.4f}, deviation {spread.deviation:.4f}, least {least}, quartiles {first}, {median}, "
            f"{third}, largest {largest}"
        )
    emit(result, text, as_json=json)
