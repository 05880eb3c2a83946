"""How a server aggregates a round: `AggregateConfig`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fedpara_edge.algorithms import SERVER, ServerAlgorithm, Weighting, find_server
from fedpara_edge.algorithms.options import option_names
from fedpara_edge.codecs import find_encoder
from fedpara_edge.errors import InputError

Merge = Literal["mean", "refit"]


@dataclass(frozen=True, kw_only=True)
class AggregateConfig:
    """The server's side of a round, in the words of the command `aggregate`.

    Args:
        algorithm: Name of the server algorithm.
        lr: Server learning rate. None, here and below, for the algorithm's default.
        momentum: Momentum of fedavgm.
        beta1: Decay of the first moment of fedadam, fedyogi and fedadagrad.
        beta2: Decay of the second moment of fedadam and fedyogi.
        tau: Floor of the second moment's root in fedadam, fedyogi and fedadagrad.
        alpha: Strength of feddyn, the same as the clients'.
        clients: Number of all clients of the federation, which scaffold and feddyn need.
        weighting: Weighting of the updates, `examples` or `equal`.
        merge: `mean` for the mean of the factors, `refit` to bring them closer to the mean of the weights.
        min_updates: Least number of valid updates.
        strict: Whether the first bad update ends the round instead of being left out.
        downlink_codec: Codec of the change that devices get in place of whole weights; None for whole weights.

    Raises:
        InputError: An option is unknown, out of range or another algorithm's; `key` is its name.

    >>> AggregateConfig(algorithm="fedadam", lr=0.1).server_algorithm
    FedAdam(lr=0.1, beta1=0.9, tau=0.001, beta2=0.99)
    """

    algorithm: str = "fedavg"
    lr: float | None = None
    momentum: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    tau: float | None = None
    alpha: float | None = None
    clients: int | None = None
    weighting: Weighting | None = None
    merge: Merge = "mean"
    min_updates: int = 1
    strict: bool = False
    downlink_codec: str | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("weighting", self.weighting, (None, *get_args(Weighting))),
            ("merge", self.merge, get_args(Merge)),
        ):
            if value not in known:
                expected = ", ".join(word for word in known if word is not None)
                raise InputError(f"expected one of {expected}, found {value!r}", key=name)
        check_min_updates(self.min_updates)
        check_merge(self.merge, self.server_algorithm)
        if self.downlink_codec is not None:
            try:
                find_encoder(self.downlink_codec)
            except InputError as error:
                raise error.under("downlink_codec") from error

    @property
    def server_algorithm(self) -> ServerAlgorithm:
        """The server algorithm with its options."""
        options = {option for kind in SERVER.values() for option in option_names(kind)}
        return find_server(self.algorithm, {name: value for name, value in vars(self).items() if name in options})

    @property
    def effective_weighting(self) -> Weighting:
        """The weighting of the updates, the algorithm's own where none was asked for."""
        return self.weighting or self.server_algorithm.weighting


def check_min_updates(least: int) -> None:
    """Refuse a least number of updates that could not be.

    Raises:
        InputError: It is below 1.
    """
    if least < 1:
        raise InputError(f"expected at least 1, found {least}", key="min_updates")


def check_merge(merge: Merge, algorithm: ServerAlgorithm) -> None:
    """Refuse a way to merge that an algorithm can't go on from.

    Raises:
        InputError: The algorithm takes no refitted factors.
    """
    if merge == "refit" and not algorithm.takes_refit:
        raise InputError(
            f"expected mean with algorithm {algorithm.name}, found refit: what the clients keep would no longer "
            "be what the server keeps",
            key="merge",
        )
