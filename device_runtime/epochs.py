"""The steps of a call, one after the other, from any of them on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from device_runtime.batches import batches_per_epoch, epoch_batches
from device_runtime.config import TrainConfig
from device_runtime.data import Dataset
from device_runtime.engines.protocol import Adjustment, Engine
from device_runtime.schedule import learning_rate_at
from fedpara_edge.errors import DivergedError, InputError


@dataclass(frozen=True)
class Step:
    """A step that was taken.

    Args:
        number: its number in the call, from 0.
        epoch: the epoch of the call it belongs to, from 0.
        loss: mean loss of its batch before it.
        examples: rows in its batch.
    """

    number: int
    epoch: int
    loss: float
    examples: int


def count_steps(dataset: Dataset, config: TrainConfig) -> int:
    """Number of steps in a call.

    Raises:
        InputError: no batch is whole and `drop_last` is set, or the warm-up takes up the whole call.
    """
    per_epoch = batches_per_epoch(dataset.examples, config.batch_size, drop_last=config.drop_last)
    steps, warmup = config.epochs * per_epoch, config.warmup_steps
    if warmup >= steps:
        raise InputError(
            f"expected fewer than the {steps} steps of this call, found {warmup}; lower it", key="warmup_steps"
        )
    return steps


def sum_learning_rates(config: TrainConfig, *, steps: int, round: int) -> float:
    """Σ_k η_k over all steps of a call that starts from weights of that round."""
    return math.fsum(_rate_at(config, number, steps=steps, round=round) for number in range(steps))


def take_steps(
    engine: Engine,
    dataset: Dataset,
    config: TrainConfig,
    *,
    first: int = 0,
    round: int = 0,
    adjustment: Adjustment | None = None,
) -> Iterator[Step]:
    """Take the steps of a call from number `first` on, each when the next is asked for.

    Order of the rows, learning rate and seed of a step depend on config, round and its number only. Epochs and steps
    are counted through all rounds, so that no two rounds of equal length draw the same orders and masks.

    Args:
        engine: holding weights and optimizer as they were after `first` steps.
        dataset: local examples.
        config: how to train.
        first: steps already taken.
        round: of the weights that the call started from.
        adjustment: what is done to the gradients; None for the config's without an affine term.

    Raises:
        InputError: a row, or the schedule, does not fit.
        DivergedError: a loss is not finite.
    """
    steps = count_steps(dataset, config)
    adjustment = config.adjustment() if adjustment is None else adjustment
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
                raise DivergedError(
                    f"step {number + 1} of {steps}: expected a finite loss, found {loss}: the training diverged; "
                    f"lower the learning rate ({learning_rate:g})"
                )
            yield Step(number, epoch, loss, len(x))
            number += 1


def _rate_at(config: TrainConfig, number: int, *, steps: int, round: int) -> float:
    return learning_rate_at(config, step=number, steps=steps, epochs=config.epochs, round=round)


def step_seed(seed: int, step: int) -> int:
    """The seed of a step, in [0, 2³¹): a hash of the call's seed and the step's number through all rounds.

    >>> step_seed(1, 0) == step_seed(1, 0) != step_seed(1, 1)
    True
    """
    return int(np.random.SeedSequence([seed, step], spawn_key=(1,)).generate_state(1)[0]) >> 1
