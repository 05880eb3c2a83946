"""A client's part in a round, in a worker process: the device runtime on real files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from device_runtime.config import TrainConfig
from device_runtime.data import open_data
from device_runtime.training import train
from fedpara_edge.aggregation import aggregate
from fedpara_edge.errors import DivergedError
from fedpara_edge.formats.weights import read_weights, write_weights
from fedpara_edge.simulation.tasks import engines
from fedpara_edge.simulation.tasks.engines import Model, bundle_at

START = "start.safetensors"
"""A client's own weights to start from, beside those after earlier rounds."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What one client is to do.

    Args:
        model: what to train.
        data: folder with its training examples.
        weights: file to start from.
        config: how to train.
        output: update to write.
        state: the client's state folder.
        client: its name.
        codec: how the update is written.
        control: server state file, for an algorithm that needs it.
        own: where to write the client's own next weights, if there is no server; those it starts from are then taken
            to be of round `round`, however old they are.
        round: that it trains in.
    """

    model: Model
    data: Path
    weights: Path
    config: TrainConfig
    output: Path
    state: Path
    client: str
    codec: str
    control: Path | None = None
    own: Path | None = None
    round: int


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What came of it.

    Args:
        examples: local examples.
        loss: mean training loss of the last epoch.
        seconds: that the steps took.
        update_bytes: size of the update.
        diverged: why there is no update, if so.
    """

    examples: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    update_bytes: int = 0
    diverged: str | None = None


def train_client(training: Training) -> Trained:
    """Train and write the update.

    Raises:
        FedparaError: anything but that the training diverged.
    """
    bundle = bundle_at(training.model.bundle)
    weights = training.weights
    if training.own is not None:
        weights = training.own.with_name(START)
        write_weights(weights, replace(read_weights(training.weights), round=training.round))
    try:
        result = train(
            bundle,
            engines.engines.fresh(training.model),
            open_data(training.data, bundle.manifest),
            weights,
            training.config,
            output=training.output,
            state=training.state,
            client=training.client,
            codec=training.codec,
            server_state=training.control,
            overwrite=True,
        )
        if training.own is not None:
            write_weights(training.own, aggregate([training.output], read_weights(weights), strict=True).weights)
    except DivergedError as error:
        return Trained(diverged=str(error))
    finally:
        if training.own is not None:
            weights.unlink(missing_ok=True)
    return Trained(
        examples=result.examples,
        loss=result.losses[-1],
        seconds=result.seconds,
        update_bytes=result.update_bytes,
    )
