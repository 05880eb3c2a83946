"""Evaluation of one model on many devices, and the distribution of the results: a mean hides whom it serves badly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from device_runtime.data import open_data
from device_runtime.engines.protocol import Engine
from device_runtime.evaluation import Evaluation, evaluate
from device_runtime.loading import load_weights
from device_runtime.sources import PLAIN, Reading
from fedpara_edge.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Client:
    """Device to evaluate on.

    Args:
        data: Data file or folder with the device's examples.
        state: State folder with the device's personal tensors; None for the initial ones.
    """

    data: Path
    state: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Distribution of one number over devices, all of which count alike.

    Args:
        mean: Mean over the devices.
        deviation: Standard deviation of these devices, not estimated as from a sample of others.
        quartiles: Minimum, first quartile, median, third quartile and maximum, by linear interpolation.
    """

    mean: float
    deviation: float
    quartiles: tuple[float, ...]


def pair_clients(data: Sequence[Path], states: Sequence[Path]) -> list[Client]:
    """Devices from their data and, in the same order, their state folders, or no state folders at all.

    Raises:
        InputError: There are state folders, but not as many as data.
    """
    if states and len(states) != len(data):
        raise InputError(
            f"expected a state folder for each of the {len(data)} datasets, or none at all, found {len(states)}; "
            "give them in the order of the datasets",
            key="state",
        )
    folders: Sequence[Path | None] = states or [None] * len(data)
    return [Client(data=each, state=state) for each, state in zip(data, folders, strict=True)]


def evaluate_clients(
    engine: Engine, weights: Path, clients: Iterable[Client], batch_size: int, reading: Reading = PLAIN
) -> list[Evaluation]:
    """Evaluate shared weights on each device, with its own personal tensors.

    Args:
        engine: Engine, newly opened with the bundle.
        weights: Weights file.
        clients: Devices to evaluate on.
        batch_size: Rows at a time, which affects the memory needed and nothing else.
        reading: Options for reading data that are no arrays.

    Raises:
        InputError: A dataset or state folder does not fit.
        WrongBundleError: The weights or a state belong to another bundle.
        DivergedError: A loss is not finite.
    """
    initial, found = engine.bundle.read_initial_personal(), []
    for client in clients:
        dataset = open_data(client.data, engine.bundle.manifest, reading)
        engine.load(initial)  # replaces those of the previous client; one without a finished call has the initial ones
        load_weights(engine, weights, state=client.state)
        found.append(evaluate(engine, dataset, batch_size))
    return found


def distribution(values: Sequence[float]) -> Distribution:
    """Distribution of one number over devices.

    >>> distribution([0.5, 1.0, 0.75])
    Distribution(mean=0.75, deviation=0.2041241452319315, quartiles=(0.5, 0.625, 0.75, 0.875, 1.0))
    """
    return Distribution(
        mean=float(np.mean(values)),
        deviation=float(np.std(values)),
        quartiles=tuple(np.quantile(values, [0, 0.25, 0.5, 0.75, 1]).tolist()),
    )
