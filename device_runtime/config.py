"""What a training call is told: `TrainConfig`, and `TrainCall` with how it runs and sends."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from device_runtime.engines.protocol import NONE, Adjustment
from device_runtime.engines.registry import ENGINES, MAX_THREADS
from device_runtime.schedule import DROP_EVERY, DROP_FACTOR, Schedule
from fedpara_edge.algorithms import CLIENT, ClientAlgorithm, find_client
from fedpara_edge.algorithms.client import Term
from fedpara_edge.codecs import ENCODERS, find_encoder
from fedpara_edge.codecs.codec import Encoder
from fedpara_edge.options import check, option
from fedpara_edge.privacy.local import LocalGaussian, check_algorithm, find_local

NO_TERM = Term()
OWN = ("engine", "threads", "tune", "save_seconds", "save_steps", "privacy")
"""Options of a `TrainCall` that are each device's own, where a server sets the others."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Schedule):
    """How to train in one call; the schedule's options among the rest.

    Args:
        epochs: Passes over the local data.
        batch_size: Examples in a step.
        seed: Seed, which decides with round and step the order of the examples and all that is random in a step.
        drop_last: Whether to leave out the last batch of an epoch when it is smaller.
        clip_norm: Norm down to which a larger gradient of a batch is scaled; None for as it is.
        micro_batches: Number of micro-batches over which the gradient of each batch is accumulated, for less memory.
        algorithm: Client algorithm with its options, such as `fedprox:mu=0.1` (`fedpara_edge.algorithms`): what is
            added to the gradients, and what the device keeps for its next round.
        save_seconds: Time between two saves of the progress.
        save_steps: Number of steps after which to save as well; None for by time only.

    Raises:
        InputError: A value is out of its range.
    """

    epochs: int = option(1, minimum=1, maximum=1 << 20, help="Local epochs.")
    batch_size: int = option(32, minimum=1, maximum=1 << 32, help="Examples in a step.")
    seed: int = option(0, minimum=0, maximum=(1 << 32) - 1, help="Seed of the order of examples and of dropout.")
    drop_last: bool = option(False, help="Leave out the last, smaller batch of an epoch.")
    clip_norm: float | None = option(
        None, above=0, unset="no clipping", help="Norm down to which the gradient of a batch is scaled."
    )
    micro_batches: int = option(
        1,
        minimum=1,
        maximum=1 << 32,
        was=("parts",),
        help="Micro-batches over which the gradient of each batch is accumulated, for less memory.",
    )
    algorithm: str = option(
        "fedavg",
        metavar="NAME[:OPTION=VALUE,…]",
        help=f"Client algorithm: {', '.join(CLIENT)}; with its options, such as fedprox:mu=0.01.",
    )
    save_seconds: float = option(30.0, minimum=0, help="Time between two saves of the progress to --state.")
    save_steps: int | None = option(
        None, minimum=1, help="Steps after which to save as well; 1 loses at most the current step."
    )

    def __post_init__(self) -> None:
        check(self)
        find_client(self.algorithm)

    @property
    def client_algorithm(self) -> ClientAlgorithm:
        """The client algorithm with its options."""
        return find_client(self.algorithm)

    def adjustment(self, term: Term = NO_TERM, *, shared: Collection[str] | None = None) -> Adjustment:
        """The adjustment of the gradients.

        Args:
            term: Affine term of the algorithm.
            shared: Names of the tensors that the term is added to, where there are others; None for all.
        """
        max_norm = math.inf if self.clip_norm is None else self.clip_norm
        adjustment = Adjustment(max_norm=max_norm, mu=term.mu, mu_of=shared if term.mu else None, h=term.h)
        return NONE if adjustment.is_none else adjustment

    def is_save_due(self, *, seconds: float, steps: int) -> bool:
        """Whether to save the progress, `seconds` and `steps` after the last time."""
        return seconds >= self.save_seconds or (self.save_steps is not None and steps >= self.save_steps)

    def decisive(self) -> dict[str, Any]:
        """The fields that decide what is learned, as plain JSON data under the names that a state folder has for them.

        All but when to save.
        """
        return {
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "learning_rate": self.lr,
            "schedule": {
                "shape": self.schedule,
                "warmup_steps": self.warmup_steps,
                "drop_every_epochs": self.drop_every or DROP_EVERY,
                "drop_factor": DROP_FACTOR if self.drop_factor is None else self.drop_factor,
                "round_decay": self.lr_decay,
            },
            "seed": self.seed,
            "drop_last": self.drop_last,
            "clip_norm": self.clip_norm,
            "parts": self.micro_batches,
            "algorithm": self.client_algorithm.to_json(),
        }


@dataclass(frozen=True, kw_only=True)
class TrainCall(TrainConfig):
    """A whole call of `fedpara-edge train`: how to train, on which engine, and how to send the change.

    Args:
        codec: Codec of the update with its options, such as `uniform:step=2` (`fedpara_edge.codecs`).
        privacy: Noise that the device adds to its change, with its options and its budget, such as
            `gaussian:clip=0.5,noise=40,epsilon=4,delta=1e-5` (`fedpara_edge.privacy.local`); None for none.
        engine: Engine that trains; `auto` for the faster of those that run here.
        threads: Threads of the engine; None for one per core.
        tune: Whether to measure which form of the training step and how many threads are the fastest, once
            (`device_runtime.tuning`).

    Raises:
        InputError: A value is out of its range.
    """

    codec: str = option(
        "float32",
        metavar="NAME[:OPTION=VALUE,…]",
        help=f"Codec of the update: {', '.join(ENCODERS)}; with its options, such as uniform:step=2. "
        "`fedpara-edge codec bench` compares them.",
    )
    privacy: str | None = option(
        None,
        metavar="NAME:OPTION=VALUE,…",
        unset="none",
        help="Noise on the change before it leaves the device, with the device's budget: gaussian, with clip, noise, "
        "epsilon and delta.",
    )
    engine: str = option("auto", choices=("auto", *ENGINES), help="Engine that trains; auto for the faster one here.")
    threads: int | None = option(
        None, minimum=1, maximum=MAX_THREADS, unset="one per core", help="Threads of the engine."
    )
    tune: bool = option(
        False,
        help="Measure once which number of threads is the fastest here, and which form of a step that was exported "
        "with --tunable; --state keeps the choice.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        find_encoder(self.codec)
        if self.mechanism is not None:
            check_algorithm(self.client_algorithm)

    @property
    def mechanism(self) -> LocalGaussian | None:
        """The noise on the change with its budget; None for none."""
        return None if self.privacy is None else find_local(self.privacy)

    @property
    def encoder(self) -> Encoder:
        """The codec with its options, ready to encode."""
        return find_encoder(self.codec)
