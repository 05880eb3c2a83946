"""The steps of a call, taken one after the other, from any of them on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from device_runtime.batches import batches_per_epoch, epoch_batches, epoch_order
from device_runtime.config import TrainConfig
from device_runtime.data import Dataset
from device_runtime.engines.protocol import Adjustment, Engine
from device_runtime.nonfinite import cause_in_training
from device_runtime.schedule import learning_rate_at
from fedpara_edge.errors import DivergedError, InputError


@dataclass(frozen=True)
class Step:
    """Step that was taken.

    Args:
        number: Number of the step in the call, from 0.
        epoch: Number of its epoch in the call, from 0.
        loss: Mean loss of the batch before the step.
        examples: Rows in the batch.
    """

    number: int
    epoch: int
    loss: float
    examples: int


def count_steps(dataset: Dataset, config: TrainConfig) -> int:
    """Number of steps in a call.

    Raises:
        InputError: No batch is whole and `drop_last` is set, or the warm-up takes up the whole call.
    """
    per_epoch = batches_per_epoch(dataset.examples, config.batch_size, drop_last=config.drop_last)
    steps, warmup = config.epochs * per_epoch, config.warmup_steps
    if warmup >= steps:
        raise InputError(
            f"expected fewer than the {steps} steps of this call, found {warmup}; lower it", key="warmup_steps"
        )
    return steps


def sum_learning_rates(config: TrainConfig, *, steps: int, round: int) -> float:
    """Sum Σ_k η_k of the learning rates of all steps k in a call that starts from weights of round `round`."""
    return math.fsum(_rate_at(config, number, steps=steps, round=round) for number in range(steps))


def take_steps(
    engine: Engine,
    dataset: Dataset,
    config: TrainConfig,
    *,
    first: int = 0,
    round: int = 0,
    adjustment: Adjustment | None = None,
    origin: Mapping[str, NDArray[np.float32]] | None = None,
) -> Iterator[Step]:
    """Take the steps of a call from number `first` on, each when the iterator is advanced.

    The order of the rows, the learning rate and the seed of a step depend only on the config, the round and the step's
    number. Epochs and steps are counted through all rounds, so that no two rounds of equal length draw the same orders
    and masks.

    Args:
        engine: Engine with weights and optimizer as they were after `first` steps.
        dataset: Local examples.
        config: Training configuration.
        first: Number of steps already taken.
        round: Round of the weights from which the call started.
        adjustment: Adjustment of the gradients; None for that of the config, without an affine term.
        origin: Tensors with which the call started, by name, to look for the cause of a loss that is not finite; None
            for those in the engine.

    Raises:
        InputError: A row, or the schedule, does not fit.
        DivergedError: A loss is not finite.
    """
    steps = count_steps(dataset, config)
    adjustment = config.adjustment() if adjustment is None else adjustment
    origin = engine.read() if origin is None else origin
    number = first
    while number < steps:
        epoch, batch = divmod(number, steps // config.epochs)
        for x, y in epoch_batches(
            dataset,
            batch_size=config.batch_size,
            seed=config.seed,
            epoch=round * config.epochs + epoch,
            drop_last=config.drop_last,
            first=batch,
        ):
            learning_rate = _rate_at(config, number, steps=steps, round=round)
            loss = engine.step(
                x,
                y,
                learning_rate=learning_rate,
                seed=step_seed(config.seed, round * steps + number),
                adjustment=adjustment,
                micro_batches=config.micro_batches,
            )
            if not math.isfinite(loss):
                order = epoch_order(dataset.examples, seed=config.seed, epoch=round * config.epochs + epoch)
                place = number % (steps // config.epochs) * config.batch_size
                rows = order[place : place + config.batch_size]
                cause = cause_in_training(
                    engine, dataset, rows, origin=origin, step=number, learning_rate=learning_rate
                )
                raise DivergedError(f"step {number + 1} of {steps}: expected a finite loss, found {loss}: {cause}")
            yield Step(number, epoch, loss, len(next(iter(x.values()))))
            number += 1


def _rate_at(config: TrainConfig, number: int, *, steps: int, round: int) -> float:
    return learning_rate_at(config, step=number, steps=steps, epochs=config.epochs, round=round)


def step_seed(seed: int, step: int) -> int:
    """Seed of a step, in [0, 2³¹): a hash of the call's seed and the step's number through all rounds.

    >>> step_seed(1, 0) == step_seed(1, 0) != step_seed(1, 1)
    True
    """
    return int(np.random.SeedSequence([seed, step], spawn_key=(1,)).generate_state(1)[0]) >> 1
