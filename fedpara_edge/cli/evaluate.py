"""`fedpara-edge evaluate`: loss and accuracy of weights on data."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from fedpara_edge.cli.output import emit, json_option

FOLDER_OR_FILE = click.Path(path_type=Path)


@click.command("evaluate")
@click.argument("bundle", type=FOLDER_OR_FILE)
@click.option("--weights", type=FOLDER_OR_FILE, help="Weights to evaluate.  [default: the bundle's]")
@click.option("--data", type=FOLDER_OR_FILE, required=True, help=".npz with x and y, or a folder with x.npy and y.npy.")
@click.option("--state", type=FOLDER_OR_FILE, help="State folder with the personal tensors.")
@click.option("--batch-size", type=int, default=256, show_default=True)
@click.option("--engine", default="auto", show_default=True, help="onnxruntime, ort-training, or the faster there is.")
@click.option("--threads", type=int, help="Of the engine.  [default: as many as cores]")
@json_option
def command(
    bundle: Path,
    weights: Path | None,
    data: Path,
    state: Path | None,
    batch_size: int,
    engine: str,
    threads: int | None,
    json: bool,
) -> None:
    """Evaluate weights of BUNDLE on data, without gradients and without dropout."""
    from fedpara_edge.cli.installed import require

    require("device")
    from device_runtime import evaluate, load_weights, open_data, open_engine
    from fedpara_edge.bundle import WEIGHTS, open_bundle

    opened = open_bundle(bundle)
    dataset = open_data(data, opened.manifest)
    running = open_engine(opened, engine, threads=threads)
    load_weights(running, opened, weights or opened.file(WEIGHTS), state=state)
    result = evaluate(running, dataset, batch_size)
    accuracy = "" if result.accuracy is None else f"accuracy {result.accuracy:.2%}, "
    text = f"{accuracy}loss {result.loss:.4f} on {result.examples} examples"
    if opened.manifest.layout.with_role("personal") and state is None:
        text += ", with the personal tensors as exported; pass --state for a device's own"
    emit(asdict(result), text, as_json=json)
