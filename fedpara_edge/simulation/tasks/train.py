"""A client's part in a round: the device runtime on real files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from device_runtime.config import TrainConfig
from device_runtime.data import open_data
from device_runtime.training import TrainResult, train
from fedpara_edge.aggregation import AggregateConfig, run_round
from fedpara_edge.codecs import find_encoder
from fedpara_edge.formats.weights import read_weights, write_weights
from fedpara_edge.simulation.tasks.engines import Model, fresh_engine

START = "start.safetensors"
"""Name of the file with a client's own weights to start from, beside those of its earlier rounds."""


def train_client(
    *,
    model: Model,
    data: Path,
    weights: Path,
    config: TrainConfig,
    update: Path,
    state: Path,
    client: str,
    codec: str,
    control: Path | None = None,
) -> TrainResult:
    """Train and write the update.

    Args:
        model: Model to train.
        data: Folder with the client's training examples.
        weights: Weights file to start from.
        config: Epochs, learning rate and the like.
        update: Update file to write.
        state: State folder of the client.
        client: Name of the client.
        codec: Codec of the update.
        control: Server state file, for an algorithm that needs it.

    Raises:
        DivergedError: The training diverged.
        FedparaError: A file is damaged or can't be written.
    """
    engine = fresh_engine(model)
    return train(
        engine,
        open_data(data, engine.bundle.manifest),
        weights,
        config,
        output=update,
        state=state,
        client=client,
        encoder=find_encoder(codec),
        server_state=control,
        overwrite=True,
    )


def train_alone(
    *,
    model: Model,
    data: Path,
    weights: Path,
    round: int,
    config: TrainConfig,
    update: Path,
    state: Path,
    client: str,
    output: Path,
) -> TrainResult:
    """Train a client that has no server, and write its own next weights.

    Args:
        model: Model to train.
        data: Folder with the client's training examples.
        weights: Weights file to start from, of whatever round the client last took part in.
        round: Round that the client trains in, from 0 on.
        config: Epochs, learning rate and the like.
        update: Update file to write.
        state: State folder of the client.
        client: Name of the client.
        output: Weights file to write.

    Raises:
        DivergedError: The training diverged.
        FedparaError: A file is damaged or can't be written.
    """
    start = output.with_name(START)
    write_weights(start, replace(read_weights(weights), round=round))
    try:
        result = train_client(
            model=model,
            data=data,
            weights=start,
            config=config,
            update=update,
            state=state,
            client=client,
            codec="float32",
        )
        run_round([update], start, output, AggregateConfig(strict=True), overwrite=True)
    finally:
        start.unlink(missing_ok=True)
    return result
