"""A client's part in a round: the device runtime on real files."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from device_runtime.data import open_data
from device_runtime.result import TrainResult
from device_runtime.training import train
from fedpara_edge.aggregation import AggregateConfig, run_round
from fedpara_edge.codecs.float32 import Float32
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.weights import read_weights, write_weights
from fedpara_edge.simulation.folder import JobFolder
from fedpara_edge.simulation.plan.plan import TrainPlan
from fedpara_edge.simulation.tasks.engines import Model, fresh_engine
from fedpara_edge.simulation.tasks.rehearsal import Rehearsal
from fedpara_edge.storage.atomic import unsynced

START = "start.safetensors"
"""Name of the file with a client's own weights to start from, beside those of its earlier rounds."""


def train_client(
    model: Model, folder: JobFolder, *, client: str, round: int, data: Path, weights: Path, options: TrainPlan
) -> TrainResult:
    """Train and write the update, which is made again if a round is cut short and so need not be synced.

    A client that keeps nothing from round to round has no state folder: its update is the same without, and the files
    and syncs of one would take as long as some steps.

    Args:
        model: Model to train.
        folder: Folder of the federation.
        client: Name of the client.
        round: Round that the client trains in, from 0 on.
        data: Folder with the client's training examples.
        weights: Weights file to start from.
        options: Epochs, learning rate and the like, with the seed of the client.

    Raises:
        DivergedError: The training diverged.
        FedparaError: A file is damaged or can't be written.
    """
    engine, control = fresh_engine(model), folder.control(round)
    state = folder.state(client) if _keeps_something(engine.bundle, options) else None
    with nullcontext() if state else unsynced():
        return train(
            engine,
            open_data(data, engine.bundle.manifest),
            weights,
            options,
            output=folder.update(client),
            state=state,
            client=client,
            encoder=options.encoder,
            privacy=options.mechanism,
            budget=Rehearsal(),
            server_state=control if control.exists() else None,
            overwrite=True,
        )


def _keeps_something(bundle: Bundle, options: TrainPlan) -> bool:
    """Whether a client keeps personal tensors, what its algorithm needs, its noise, or what its codec leaves out."""
    personal = bundle.manifest.layout.with_role("personal")
    kept = (options.client_algorithm.group, options.mechanism)
    return bool(personal) or any(each is not None for each in kept) or options.encoder.name != Float32.name


def train_alone(
    model: Model, folder: JobFolder, *, client: str, round: int, data: Path, weights: Path, options: TrainPlan
) -> TrainResult:
    """Train a client that has no server, and write its own next weights.

    The arguments are those of `train_client`, with weights of whatever round the client last took part in.

    Raises:
        DivergedError: The training diverged.
        FedparaError: A file is damaged or can't be written.
    """
    output = folder.own_weights(client, round + 1)
    start = output.with_name(START)
    write_weights(start, replace(read_weights(weights), round=round))
    exact = replace(options, codec="float32", privacy=None)
    try:
        result = train_client(model, folder, client=client, round=round, data=data, weights=start, options=exact)
        run_round([folder.update(client)], start, output, AggregateConfig(strict=True), overwrite=True)
    finally:
        start.unlink(missing_ok=True)
    return result
