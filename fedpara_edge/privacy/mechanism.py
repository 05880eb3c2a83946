"""The Gaussian mechanism on the sum of the clients' changes: clipped, added up exactly, and hidden in noise.

With Δ_i the change that client i sends, all of its entries as one vector, S = `clip`, z = `noise`, m = `expected`:

    change   Δ_i ← Δ_i min(1, S / ‖Δ_i‖)
    mean     (Σ_i Δ_i + N(0, (z S)²)) / m

What is protected is the presence of a client: two rounds are neighbours if one has the updates of the other and those
of one client more (add or remove one). That client moves the sum by at most S. All clients count alike, as the number
of examples tells about a client too, and m is fixed beforehand, as is the number that takes part.

All sums are of integers, multiples of z S / `RESOLUTION`, to which clipped changes are cut towards zero: so a sum has
no rounding that depends on its terms, and the sensitivity holds to the last bit (Casacuberta et al. 2022,
arXiv 2207.10635). The noise is an integer too (`noise`). Rounding a Gaussian to integers and adding integers commute,
so that the outcome is one of the ideal mechanism, rounded. What is cut off, below N / `RESOLUTION` of the noise for N
clients, drowns in it.

Sources: McMahan et al. 2018, arXiv 1710.06963 (DP-FedAvg with flat clipping and the fixed-denominator estimator);
Mironov 2012 (what the low bits of a noise in floating point give away).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.errors import InputError
from fedpara_edge.factors.layout import Layout
from fedpara_edge.options import check, choose, option

RESOLUTION = 1 << 20
"""Steps of the grid in one standard deviation of the noise."""
SLACK = 2.0**-20
"""Share by which changes are clipped more than asked for: a norm in float64 is off by less, up to 2^32 entries."""
MIN_NOISE, MAX_NOISE, MAX_CLIP = 1e-3, 1e6, 1e30
"""Limits within which integers on the grid are exact in float64, and noisy changes within float32."""
TILE = 1 << 12


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """The Gaussian mechanism with the budget that may be spent on it.

    Args:
        clip: Largest L2 norm of a client's change; a larger change is scaled down.
        noise: Standard deviation of the noise on the sum, in clips.
        expected: Number that the sum is divided by, whatever number takes part.
        epsilon: Largest ε of all rounds together.
        delta: δ at which ε is measured.
        sampling: Probability with which each client takes part, drawn in secret and independently for each round.

    Raises:
        InputError: An option is out of its range.
    """

    clip: float = option(
        above=0, maximum=MAX_CLIP, help="Largest L2 norm of a client's change; a larger change is scaled down."
    )
    noise: float = option(
        minimum=MIN_NOISE, maximum=MAX_NOISE, help="Standard deviation of the noise on the sum, in clips."
    )
    expected: int = option(minimum=1, help="Number that the sum is divided by, whatever number takes part.")
    epsilon: float = option(above=0, help="Largest ε of all rounds together.")
    delta: float = option(above=0, below=1, help="δ at which ε is measured; well below one over all clients.")
    sampling: float = option(
        1.0, above=0, maximum=1, help="Probability with which each client takes part, drawn in secret for each round."
    )

    name: ClassVar[str] = "gaussian"

    def __post_init__(self) -> None:
        check(self)

    @property
    def limit(self) -> float:
        """Largest norm of a clipped change in steps of the grid."""
        return RESOLUTION / self.noise

    @property
    def step(self) -> float:
        """Change of the mean that one step of the grid stands for."""
        return self.clip * self.noise / RESOLUTION / self.expected

    @property
    def grid(self) -> dict[str, Any]:
        """What decides the sum of clipped changes: name, clip and noise, plain data for `json.dumps`."""
        return {"name": self.name, "clip": self.clip, "noise": self.noise}

    def factors(self, norms: NDArray[np.float64]) -> NDArray[np.float64]:
        """Factors from changes to clipped ones in steps of the grid, float64 [updates].

        Args:
            norms: Norms of the changes, float64 [updates].
        """
        return self.limit * (1 - SLACK) / np.maximum(norms, self.clip)

    def to_json(self) -> dict[str, Any]:
        """Name and options, plain data for `json.dumps`."""
        return {"name": self.name, **asdict(self)}


def clipped(rows: NDArray[np.floating[Any]], factors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Some entries of clipped changes in steps of the grid, integers in float64 [updates, entries].

    Args:
        rows: Changes, finite, float32 [updates, entries].
        factors: Factors of `Gaussian.factors`.
    """
    return np.trunc(rows * factors[:, None])


def clipped_sum(rows: NDArray[np.float32], factors: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum over the updates of `clipped`, exact, float64 [entries]."""
    total = np.empty(rows.shape[1])
    for start in range(0, len(total), TILE):
        tile = slice(start, start + TILE)
        total[tile] = clipped(rows[:, tile], factors).sum(axis=0)
    return total


def check_layout(layout: Layout) -> None:
    """Refuse a model that sends running statistics, whose variances are no sums of what clients send.

    Raises:
        InputError: It does.
    """
    shared = {tensor.name for tensor in layout.shared}
    if sent := [tensor.name for tensor in layout.statistics if tensor.name in shared]:
        raise InputError(
            f"expected a model that sends no running statistics with privacy, found {sent[0]!r} and "
            f"{len(sent) - 1} more; export it with --batchnorm freeze or local",
            key="privacy",
        )


MECHANISMS: Mapping[str, type[Gaussian]] = {Gaussian.name: Gaussian}
"""Mechanisms by name."""


def find_mechanism(text: str) -> Gaussian:
    """The mechanism that a user asks for.

    Args:
        text: Name, a key of `MECHANISMS`, and options after a colon.

    Raises:
        InputError: There is none of that name, or an option is unknown, missing or out of its range.

    >>> find_mechanism("gaussian:clip=0.5,noise=1.1,expected=100,epsilon=8,delta=1e-5").limit
    953250.9090909091
    """
    mechanism: Gaussian = choose(MECHANISMS, text, key="privacy")
    return mechanism
