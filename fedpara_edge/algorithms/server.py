"""Server algorithms: from the mean change to the next weights, and what the server keeps from round to round.

With Δ = Σ_{i∈S} s_i Δ_i the mean change of the devices of a round, q = |S| / N and N the number of all devices:

    fedavg     x ← x + η Δ
    fedavgm    m ← β m + Δ                        x ← x + η m             Hsu et al. 2019, arXiv 1909.06335
    scaffold   c ← c - q (c + Σ s_i Δ_i / R_i)    x ← x + η Δ             Karimireddy et al. 2020, arXiv 1910.06378
    feddyn     h ← h - α q Δ                      x ← x + Δ - h / α       Acar et al. 2021, arXiv 2111.04263

(`adaptive` has the others.) η is the server's learning rate, which the published FedDyn does not have, R_i = Σ_k η_k
the sum of a device's learning rates. All that is kept starts at 0.

The shares s_i go by examples, n_i / Σ n, or are equal, 1 / |S|. Scaffold and FedDyn are equal in their papers and so
they are here unless told otherwise; the same shares then weigh c and h, so that what all devices keep cancels out. With
equal shares c is the mean of the c_i of all N devices, and h that of the ∇_i, however few take part in a round.

For scaffold, c_i⁺ - c_i = -c - Δ_i / R_i (`local`), so the devices send nothing besides Δ_i and R_i. This is exact for
plain SGD, which is all that the device takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.algorithms.local import ALPHA, RATE_SUM
from fedpara_edge.algorithms.options import check_number
from fedpara_edge.errors import InputError, InvalidUpdateError

Weighting = Literal["examples", "equal"]
Vector = NDArray[np.float64]
Metrics = Mapping[str, float]

LARGEST = float(np.finfo(np.float32).max)
RATE_SUMS = (1e-30, 1e30)


@dataclass(frozen=True, kw_only=True)
class ServerAlgorithm:
    """What a server algorithm is; those with options raise InputError for one that is out of range.

    Attributes:
        name: as the user types it.
        groups: what it keeps, a vector of the size of the weights each.
        takes_refit: whether the mean that it gets may be that of refitted factors.
        weighting: how devices are weighed unless the user says otherwise.
    """

    name: ClassVar[str]
    groups: ClassVar[tuple[str, ...]] = ()
    takes_refit: ClassVar[bool] = True
    weighting: ClassVar[Weighting] = "examples"

    @property
    def convex(self) -> bool:
        """Whether the new weights lie between those of the base and of the devices."""
        return False

    def options(self) -> dict[str, Any]:
        """The options by name, plain data for `json.dumps`."""
        return asdict(self)

    def participation(self, updates: int) -> float:  # noqa: ARG002
        """q, the share of all devices that take part.

        Raises:
            InputError: more take part than there are.
        """
        return 1.0

    def check_metrics(self, metrics: Metrics) -> None:
        """Refuse an update that was not trained for this algorithm, as far as its metrics tell.

        Raises:
            InvalidUpdateError: a metric is missing or differs.
        """

    def largest_change(self, metrics: Metrics) -> float:  # noqa: ARG002
        """How large an entry of a device's change may be, so that its square, and what is kept, stays in float32."""
        return math.inf if self.convex else math.sqrt(LARGEST)

    def shares(self, weights: Vector, metrics: Sequence[Metrics]) -> Vector:  # noqa: ARG002
        """The weights of all changes in every mean that is needed, float64 [means, updates], from their shares s."""
        return weights[None]

    def start(self, group: str) -> float:  # noqa: ARG002
        """What all entries of a group are before the first round."""
        return 0.0

    def step(self, means: Vector, kept: Mapping[str, Vector], participation: float) -> tuple[Vector, dict[str, Vector]]:
        """The movement of the weights, and what is kept next; entry by entry, so any part of a model will do.

        Args:
            means: the means for `shares`, float64 [means, entries].
            kept: the groups, float64 [entries] each.
            participation: q.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class FedAvg(ServerAlgorithm):
    """The mean, McMahan et al. 2017 (arXiv 1602.05629).

    Args:
        lr: η.
    """

    lr: float = 1.0

    name = "fedavg"

    def __post_init__(self) -> None:
        check_number("lr", self.lr, above=0)

    @property
    def convex(self) -> bool:
        """As long as it goes no further than the mean."""
        return self.lr <= 1

    def step(self, means: Vector, kept: Mapping[str, Vector], participation: float) -> tuple[Vector, dict[str, Vector]]:  # noqa: ARG002
        """η Δ."""
        return self.lr * means[0], {}


@dataclass(frozen=True, kw_only=True)
class FedAvgM(ServerAlgorithm):
    """The mean with momentum.

    Args:
        lr: η.
        momentum: β.
    """

    lr: float = 1.0
    momentum: float = 0.9

    name = "fedavgm"
    groups = ("momentum",)

    def __post_init__(self) -> None:
        check_number("lr", self.lr, above=0)
        check_number("momentum", self.momentum, least=0, below=1)

    def step(self, means: Vector, kept: Mapping[str, Vector], participation: float) -> tuple[Vector, dict[str, Vector]]:  # noqa: ARG002
        """m ← β m + Δ."""
        momentum = self.momentum * kept["momentum"] + means[0]
        return self.lr * momentum, {"momentum": momentum}


@dataclass(frozen=True, kw_only=True)
class Scaffold(ServerAlgorithm):
    """The mean, and the mean of the devices' control variates.

    Args:
        clients: number N of all devices.
        lr: η.
    """

    clients: int
    lr: float = 1.0

    name = "scaffold"
    groups = ("control",)
    weighting = "equal"

    def __post_init__(self) -> None:
        check_number("lr", self.lr, above=0)
        _check_clients(self.clients)

    def participation(self, updates: int) -> float:
        """|S| / N."""
        return _participation(updates, self.clients)

    def check_metrics(self, metrics: Metrics) -> None:
        """Σ η is needed, and of a size that a training could have had."""
        least, most = RATE_SUMS
        if not least <= metrics.get(RATE_SUM, 0) <= most:
            expected = f"a metric {RATE_SUM} from {least:g} to {most:g}"
            raise _wrong_algorithm(self, expected, metrics.get(RATE_SUM))

    def largest_change(self, metrics: Metrics) -> float:
        """Δ_i / R_i must be in float32 as well."""
        return min(math.sqrt(LARGEST), LARGEST * metrics[RATE_SUM])

    def shares(self, weights: Vector, metrics: Sequence[Metrics]) -> Vector:
        """For Σ s_i Δ_i and Σ s_i Δ_i / R_i."""
        return np.stack([weights, weights / np.array([metric[RATE_SUM] for metric in metrics], np.float64)])

    def step(self, means: Vector, kept: Mapping[str, Vector], participation: float) -> tuple[Vector, dict[str, Vector]]:
        """c ← c - q (c + Σ s_i Δ_i / R_i)."""
        control = (1 - participation) * kept["control"] - participation * means[1]
        return self.lr * means[0], {"control": control}


@dataclass(frozen=True, kw_only=True)
class FedDyn(ServerAlgorithm):
    """The mean of the trained weights, less what the devices' penalties have gathered.

    Args:
        clients: number N of all devices.
        alpha: α, the same as the devices'.
    """

    clients: int
    alpha: float = 0.1

    name = "feddyn"
    groups = ("h",)
    takes_refit = False  # h is the mean of what the devices keep, who know nothing of a refit
    weighting = "equal"

    def __post_init__(self) -> None:
        _check_clients(self.clients)
        check_number("alpha", self.alpha, above=0)

    def participation(self, updates: int) -> float:
        """|S| / N."""
        return _participation(updates, self.clients)

    def check_metrics(self, metrics: Metrics) -> None:
        """Devices and server must have one α."""
        if metrics.get(ALPHA) != self.alpha:
            raise _wrong_algorithm(self, f"metric {ALPHA} {self.alpha:g}", metrics.get(ALPHA))

    def step(self, means: Vector, kept: Mapping[str, Vector], participation: float) -> tuple[Vector, dict[str, Vector]]:
        """h ← h - α q Δ."""
        h = kept["h"] - self.alpha * participation * means[0]
        return means[0] - h / self.alpha, {"h": h}


def _check_clients(clients: Any) -> None:
    if type(clients) is not int or clients < 1:
        raise InputError(f"clients: expected the number of all clients, at least 1, found {clients!r}")


def _participation(updates: int, clients: int) -> float:
    if updates > clients:
        raise InputError(
            f"clients: expected at least as many as the {updates} that take part, found {clients}; "
            "give the number of all clients of the federation"
        )
    return updates / clients


def _wrong_algorithm(algorithm: ServerAlgorithm, expected: str, found: float | None) -> InvalidUpdateError:
    return InvalidUpdateError(
        f"expected {expected} for algorithm {algorithm.name}, found {'none' if found is None else f'{found:g}'}; "
        "train with the server's algorithm and options",
        code="wrong_algorithm",
    )
