"""The Gaussian mechanism on a device: its change is clipped and hidden in noise before anything of it leaves.

With Δ the change that is to be sent, all of its entries as one vector, S = `clip`, z = `noise`:

    Δ ← Δ min(1, S / ‖Δ‖) + N(0, (z S)²)

What is protected are all data of the device, from whoever gets its updates, the server among them: whatever data and
whatever state a device has, clipped changes are at most 2 S apart. So its updates are as private as releases of
N(0, (z / 2)²) on a sum with sensitivity 1, and those of several rounds together as one release, with

    1 / σ² = Σ_i (2 / z_i)²

since independent Gaussians compose to one (`epsilon`, whose ε has a closed form: Balle and Wang 2018, arXiv 1805.06530,
theorem 8; Dong et al. 2019, arXiv 1905.02383, corollary 3.3). All that becomes of an update afterwards, its codec, the
residual of error feedback, what the algorithm keeps, the aggregation, tells no more than the update does.

Steps, grid and noise are those of the server (`mechanism`, `noise`).

Sources: Kasiviswanathan et al. 2008, arXiv 0803.0924 (local privacy); Flower's LocalDpMod, which takes one round's ε
instead, and bounds its noise less tightly.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.algorithms import ClientAlgorithm
from fedpara_edge.errors import InputError, brief
from fedpara_edge.options import check, choose, declared, option
from fedpara_edge.privacy.mechanism import MAX_CLIP, MAX_NOISE, MIN_NOISE, RESOLUTION, SLACK
from fedpara_edge.privacy.noise import gaussian_integers


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Noise on a change, as an update states it.

    Args:
        clip: Largest L2 norm of the change; a larger one is scaled down.
        noise: Standard deviation of the noise on each entry, in clips.

    Raises:
        InputError: A value is out of its range.
    """

    clip: float = option(
        above=0, maximum=MAX_CLIP, help="Largest L2 norm of the device's change; a larger one is scaled down."
    )
    noise: float = option(
        minimum=MIN_NOISE, maximum=MAX_NOISE, help="Standard deviation of the noise on each entry, in clips."
    )

    name: ClassVar[str] = "gaussian"

    def __post_init__(self) -> None:
        check(self)

    def to_json(self) -> dict[str, Any]:
        """Name, clip and noise, plain data for `json.dumps`."""
        return {"name": self.name, **{name: getattr(self, name) for name in declared(Noise)}}


@dataclass(frozen=True, kw_only=True)
class LocalGaussian(Noise):
    """The Gaussian mechanism on a device with the budget that may be spent on it.

    Args:
        clip: Largest L2 norm of the change; a larger one is scaled down.
        noise: Standard deviation of the noise on each entry, in clips.
        epsilon: Largest ε of all updates of the device together.
        delta: δ at which ε is measured.

    Raises:
        InputError: An option is out of its range.
    """

    epsilon: float = option(above=0, help="Largest ε of all updates of the device together.")
    delta: float = option(above=0, below=1, help="δ at which ε is measured.")

    sampling: ClassVar[float] = 1.0

    def on_grid(self, change: NDArray[np.float32]) -> NDArray[np.float64]:
        """The clipped change in steps of the grid, integers in float64 [entries].

        Args:
            change: Finite change, float32 [entries].
        """
        norm = float(np.sqrt(np.dot(wide := change.astype(np.float64), wide)))
        wide *= RESOLUTION / self.noise * (1 - SLACK) / max(norm, self.clip)
        return np.trunc(wide, out=wide)

    def content(self, steps: NDArray[np.float64], base: str) -> bytes:
        """Digest of what decides the noisy change: the weights before, the grid and the clipped change on it.

        Args:
            steps: Clipped change of `on_grid`.
            base: SHA-256 of the weights from which the training started.
        """
        found = hashlib.sha256(json.dumps([base, self.name, self.clip, self.noise]).encode())
        found.update(steps.data)
        return found.digest()

    def noisy(self, steps: NDArray[np.float64], key: bytes) -> NDArray[np.float32]:
        """The change to send, float32 [entries].

        Args:
            steps: Clipped change of `on_grid`, which is used up.
            key: Secret key of the noise.
        """
        steps += gaussian_integers(key, len(steps), RESOLUTION)
        steps *= self.clip * self.noise / RESOLUTION
        return steps.astype(np.float32)


LOCAL = {LocalGaussian.name: LocalGaussian}
"""Mechanisms of a device by name."""


def find_local(text: str) -> LocalGaussian:
    """The mechanism of a device that a user asks for.

    Args:
        text: Name, a key of `LOCAL`, and options after a colon.

    Raises:
        InputError: There is none of that name, or an option is unknown, missing or out of its range.

    >>> find_local("gaussian:clip=0.5,noise=8,epsilon=4,delta=1e-5").to_json()
    {'name': 'gaussian', 'clip': 0.5, 'noise': 8.0}
    """
    mechanism: LocalGaussian = choose(LOCAL, text, key="privacy")
    return mechanism


def check_algorithm(algorithm: ClientAlgorithm) -> None:
    """Refuse an algorithm whose updates state more than a noisy change.

    Raises:
        InputError: It is such.
    """
    if algorithm.states_steps:
        raise InputError(
            f"expected an algorithm whose updates state nothing about the steps with privacy, found {algorithm.name}; "
            "choose feddyn, or another",
            key="algorithm",
        )


def stated(found: Any) -> Noise:
    """The noise that an update states.

    Raises:
        InputError: It states something else.
    """
    options = declared(Noise)
    if not isinstance(found, dict) or found.keys() != {"name", *options} or found["name"] != Noise.name:
        raise InputError(f"expected {', '.join(('name', *options))} of noise, found {brief(found)}", key="privacy")
    try:
        return Noise(**{name: found[name] for name in options})
    except InputError as error:
        raise error.under("privacy") from error


def epsilon(updates: Iterable[tuple[float, float]], delta: float) -> float:
    """The ε of all updates of a device together at a δ, at most 2^-40 of it too large.

    Args:
        updates: Standard deviation of the noise of each in clips, and a probability of taking part, which is no help.
        delta: δ.

    >>> round(epsilon([(8.0, 1.0)] * 4, 1e-5), 3)
    1.993
    """
    return epsilon_of(math.fsum(1 / noise**2 for noise, _ in updates), delta)


def epsilon_of(precision: float, delta: float) -> float:
    """The same from the sum of 1 / noise² over the updates."""
    sensitivity = 2 * math.sqrt(precision)
    low, high = 0.0, 1.0
    if not sensitivity or _delta(0.0, sensitivity) <= delta:
        return 0.0
    while _delta(high, sensitivity) > delta:
        low, high = high, 2 * high
    while high - low > 2.0**-40 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _delta(middle, sensitivity) > delta else (low, middle)
    return high


def _delta(epsilon: float, sensitivity: float) -> float:
    """The δ of a Gaussian of deviation 1 at an ε: Φ(-a) - exp(ε) Φ(-b), a and b = ε / sensitivity ∓ sensitivity / 2.

    As exp(ε) Φ(-b) = φ(a) Φ(-b) / φ(b), nothing overflows.
    """
    a, b = epsilon / sensitivity - sensitivity / 2, epsilon / sensitivity + sensitivity / 2
    ratio = (
        math.sqrt(math.pi / 2) * math.exp(b * b / 2) * math.erfc(b / math.sqrt(2)) if b < 25 else b / (b * b + 1)
    )  # Gordon's bound, too small by less than 2 / b^4 of it
    return math.erfc(a / math.sqrt(2)) / 2 - math.exp(-a * a / 2) / math.sqrt(2 * math.pi) * ratio
