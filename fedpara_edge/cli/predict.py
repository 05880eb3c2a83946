"""`fedpara-edge predict`: what a folded model makes of data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from device_runtime.sources import Reading
from fedpara_edge.cli.command import Command
from fedpara_edge.cli.options import DATA, PATH, options_of
from fedpara_edge.cli.output import emit, output_options
from fedpara_edge.cli.received import find_model, model_repository_options
from fedpara_edge.cli.scores import as_json, as_text
from fedpara_edge.errors import counted


@click.command("predict", cls=Command)
@click.argument("model", type=PATH, required=False)
@model_repository_options
@click.option("--data", type=PATH, required=True, help=f"{DATA} Labels give metrics.")
@options_of(Reading, into="reading")
@click.option("-o", "--output", type=PATH, required=True, help=".npz to write: the outputs and the predicted labels.")
@click.option("--batch-size", type=int, default=256, show_default=True)
@click.option("--threads", type=int, help="Of onnxruntime.  [default: as many as cores]")
@output_options
def command(
    model: Path | None,
    repository: str | None,
    root: Path | None,
    cache: Path | None,
    data: Path,
    reading: Mapping[str, Any],
    output: Path,
    batch_size: int,
    threads: int | None,
    overwrite: bool,
    json: bool,
) -> None:
    """Predict data with MODEL, a folded model."""
    from fedpara_edge.cli.installed import require

    require("device")
    from device_runtime.data import open_inputs
    from device_runtime.prediction import Predictor, predict_all, write_predictions
    from fedpara_edge.storage.atomic import check_output

    check_output(output, overwrite=overwrite, inputs=(model, data))
    predictor = Predictor(
        find_model(model, repository=repository, root=root, cache=cache),
        threads=threads,
    )
    inputs = open_inputs(data, predictor.spec, Reading(**reading))
    predictions = predict_all(predictor, inputs, batch_size)
    write_predictions(output, predictions)
    accuracy = predictions.accuracy
    result: dict[str, Any] = {"predictions": output, "examples": inputs.examples, "accuracy": accuracy}
    text = f"{output}: {counted(inputs.examples, 'example')}" + (
        "" if accuracy is None else f", accuracy {accuracy:.2%}"
    )
    labels = predictor.spec.interface.labels
    if predictions.counts:
        result["labels"] = as_json(predictions.counts, labels)
    emit(result, "\n".join([text, *as_text(predictions.counts, labels, with_table=False)]), as_json=json)
