"""`fedpara-edge evaluate`: loss and accuracy of weights on data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from device_runtime.sources import Reading
from fedpara_edge.cli.command import Command
from fedpara_edge.cli.options import DATA, PATH, options_of
from fedpara_edge.cli.output import emit, json_option, table
from fedpara_edge.cli.received import find_origin, repository_options
from fedpara_edge.cli.scores import TABLE, as_json, as_text, check_metrics
from fedpara_edge.errors import counted
from fedpara_edge.metrics import METRICS

if TYPE_CHECKING:
    from device_runtime.evaluation import Evaluation


@click.command("evaluate", cls=Command)
@click.argument("bundle", type=PATH, required=False)
@repository_options
@click.option("--weights", type=PATH, help="Weights to evaluate.  [default: the bundle's]")
@click.option(
    "--data",
    type=PATH,
    required=True,
    multiple=True,
    help=f"{DATA} Several for several clients.",
)
@click.option(
    "--state",
    type=PATH,
    multiple=True,
    help="State folder with the personal tensors. With several clients, one for each, in the same order.",
)
@options_of(Reading, into="reading")
@click.option(
    "--metric",
    multiple=True,
    metavar="NAME",
    help=f"Metric to print in place of those that fit the labels: {', '.join(METRICS)}; {TABLE} for the table of all.",
)
@click.option("--batch-size", type=int, default=256, show_default=True)
@click.option("--engine", default="auto", show_default=True, help="onnxruntime, ort-training, or the faster there is.")
@click.option("--threads", type=int, help="Of the engine.  [default: as many as cores]")
@json_option
def command(
    bundle: Path | None,
    repository: str | None,
    root: Path | None,
    cache: Path | None,
    weights: Path | None,
    data: tuple[Path, ...],
    state: tuple[Path, ...],
    reading: Mapping[str, Any],
    metric: tuple[str, ...],
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
    from device_runtime.clients import distribution, evaluate_clients, pair_clients
    from device_runtime.evaluation import overall
    from fedpara_edge.formats.bundle import WEIGHTS, open_bundle

    clients = pair_clients(data, state)
    device = state[0] if len(state) == 1 else None
    origin = find_origin(bundle, weights, repository=repository, root=root, cache=cache, state=device)
    opened = open_bundle(origin.bundle)
    running = open_engine(opened, engine, threads=threads)
    found = evaluate_clients(running, origin.weights or opened.file(WEIGHTS), clients, batch_size, Reading(**reading))
    together = overall(found)
    check_metrics(metric, together.counts)
    labels = opened.interface.labels
    accuracy = "" if together.accuracy is None else f"accuracy {together.accuracy:.2%}, "
    text = f"{accuracy}loss {together.loss:.4f} on {counted(together.examples, 'example')}"
    if opened.manifest.layout.with_role("personal") and not state:
        text += ", with the personal tensors as exported; pass --state for a device's own"
    result: dict[str, Any] = {**_plain(together), "labels": as_json(together.counts, labels)}
    several = len(clients) > 1
    text = "\n".join([text, *as_text(together.counts, labels, asked=metric, with_table=not several)])
    if several:
        measure = next((name for name in metric if name != TABLE), "loss" if together.accuracy is None else "accuracy")
        values = [each.metric(measure) for each in found]
        spread = distribution([value for value in values if value is not None])
        result["clients"] = [
            {"data": client.data, "state": client.state, **_plain(each)}
            for client, each in zip(clients, found, strict=True)
        ]
        result["distribution"] = {"of": measure, **asdict(spread)}
        least, first, median, third, largest = (f"{value:.4f}" for value in spread.quartiles)
        rows = [
            (str(client.data), "-" if value is None else f"{value:.4f}", each.examples)
            for client, value, each in zip(clients, values, found, strict=True)
        ]
        text = (
            f"{table(('client', measure, 'examples'), rows)}\n\n{text}\n{measure} of "
            f"{counted(len(clients), 'client')}: "
            f"mean {spread.mean:.4f}, deviation {spread.deviation:.4f}, least {least}, quartiles {first}, {median}, "
            f"{third}, largest {largest}"
        )
    emit(result, text, as_json=json)


def _plain(evaluation: Evaluation) -> dict[str, Any]:
    return {"loss": evaluation.loss, "accuracy": evaluation.accuracy, "examples": evaluation.examples}
