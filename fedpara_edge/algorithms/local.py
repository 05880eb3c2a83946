"""Local algorithms: what a device adds to its gradients, and what it keeps from round to round.

With x the global weights and w those being trained, each changes the gradient g by an affine term, g + μ w + h:

    fedavg     nothing                        McMahan et al. 2017, arXiv 1602.05629
    fedprox    μ (w - x)                      Li et al. 2020, arXiv 1812.06127
    scaffold   c - c_i                        Karimireddy et al. 2020, arXiv 1910.06378, option II
    feddyn     α (w - x) - ∇_i                Acar et al. 2021, arXiv 2111.04263

on the shared tensors alone; personal ones follow their own gradient. c is the server's control variate, c_i and ∇_i are
the device's own, 0 before its first round. After the steps, with Δ the change as every reader of the update decodes it,

    scaffold   c_i ← c_i - c - Δ / Σ_k η_k        (η_k the learning rates of the steps)
    feddyn     ∇_i ← ∇_i - α Δ

The change as decoded, and not as trained, so that the server, which knows nothing else, keeps the exact mean of what
the devices keep, with lossy codecs as well. So no algorithm sends more than Δ: the server finds c_i⁺ - c_i from Δ and
Σ η_k, which is in the update's metrics.

Clipping comes after the affine term. For scaffold that clips g - c_i + c, as it should be: c_i takes in what was really
done and approaches the gradient in steps of bounded length, where clipping g alone would fix the error of the clipping
in every c_i.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.algorithms.options import check_number
from fedpara_edge.errors import DivergedError, InputError

Tensors = Mapping[str, NDArray[np.float32]]

RATE_SUM = "learning_rate_sum"
ALPHA = "alpha"


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a local training starts with.

    Args:
        weights: the global weights x, all shared tensors by name.
        kept: c_i or ∇_i, by name; empty for zeros.
        control: c, by name; empty for zeros.
        rate_sum: Σ_k η_k over all steps of the call.
    """

    weights: Tensors
    kept: Tensors = field(default_factory=dict)
    control: Tensors = field(default_factory=dict)
    rate_sum: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Term:
    """The affine term μ w + h of shared tensors: μ, and h float32 by name, None for zeros."""

    mu: float = 0.0
    h: Tensors | None = None


@dataclass(frozen=True, kw_only=True)
class LocalAlgorithm:
    """What a local algorithm is; as it stands, it does nothing.

    Attributes:
        name: as the user types it.
        group: under which the device keeps what it keeps (`device_runtime.state`); None for nothing.
        controlled: whether it takes the server's control variate.
    """

    name: ClassVar[str]
    group: ClassVar[str | None] = None
    controlled: ClassVar[bool] = False

    def to_json(self) -> dict[str, Any]:
        """Name and options, plain data for `json.dumps`."""
        return {"name": self.name, **asdict(self)}

    def check_optimizer(self, constants: Mapping[str, Any]) -> None:
        """Refuse a bundle's optimizer (`Manifest.optimizer`) with which the algorithm would be wrong.

        Raises:
            InputError: the constant at fault.
        """

    def term(self, start: Start) -> Term:  # noqa: ARG002
        """What is added to the gradients of the shared tensors."""
        return Term()

    def keep(self, start: Start, sent: Tensors) -> dict[str, NDArray[np.float32]]:  # noqa: ARG002
        """What the device keeps for its next round.

        Args:
            start: what the training started with.
            sent: the change of the shared tensors as decoded.

        Raises:
            DivergedError: it is beyond float32.
        """
        return {}

    def metrics(self, start: Start) -> dict[str, float]:  # noqa: ARG002
        """What the update states, so that the server can follow."""
        return {}


@dataclass(frozen=True, kw_only=True)
class FedAvg(LocalAlgorithm):
    """Plain local training."""

    name = "fedavg"


@dataclass(frozen=True, kw_only=True)
class FedProx(LocalAlgorithm):
    """A pull towards the global weights: the loss plus μ/2 ‖w - x‖².

    Args:
        mu: its strength.

    Raises:
        InputError: it is negative or not finite.
    """

    mu: float = 0.1

    name = "fedprox"

    def __post_init__(self) -> None:
        check_number("mu", self.mu, least=0)

    def term(self, start: Start) -> Term:
        """μ (w - x)."""
        return Term(mu=self.mu, h={name: -np.float32(self.mu) * tensor for name, tensor in start.weights.items()})


@dataclass(frozen=True, kw_only=True)
class Scaffold(LocalAlgorithm):
    """Gradients corrected by the difference between everybody's direction and one's own."""

    name = "scaffold"
    group = "control"
    controlled = True

    def check_optimizer(self, constants: Mapping[str, Any]) -> None:
        """-Δ / Σ η is the mean of the gradients for plain SGD only."""
        found = next((key for key in ("momentum", "weight_decay") if constants.get(key)), None)
        if constants["name"] != "sgd" or found:
            stated = f"{found} {constants[found]}" if found and constants["name"] == "sgd" else constants["name"]
            raise InputError(
                f"optimizer: expected plain sgd with algorithm scaffold, found {stated}; "
                "export with --optimizer sgd and no momentum, or take feddyn"
            )

    def term(self, start: Start) -> Term:
        """c - c_i."""
        if not start.control and not start.kept:
            return Term()
        return Term(h={name: _of(start.control, name) - _of(start.kept, name) for name in start.weights})

    def keep(self, start: Start, sent: Tensors) -> dict[str, NDArray[np.float32]]:
        """c_i - c - Δ / Σ η."""
        return {name: _rounded(name, self._next(start, name, change)) for name, change in sent.items()}

    def metrics(self, start: Start) -> dict[str, float]:
        """Σ η."""
        return {RATE_SUM: start.rate_sum}

    def _next(self, start: Start, name: str, change: NDArray[np.float32]) -> NDArray[np.float64]:
        correction = np.subtract(_of(start.kept, name), _of(start.control, name), dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return np.asarray(correction - np.divide(change, start.rate_sum, dtype=np.float64))


@dataclass(frozen=True, kw_only=True)
class FedDyn(LocalAlgorithm):
    """A penalty that moves with the rounds, so that all local optima come to agree with the global one.

    Args:
        alpha: its strength α, the same as the server's.

    Raises:
        InputError: it is not positive and finite.
    """

    alpha: float = 0.1

    name = "feddyn"
    group = "dynamic"

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, above=0)

    def term(self, start: Start) -> Term:
        """α (w - x) - ∇_i."""
        alpha = np.float32(self.alpha)
        return Term(
            mu=self.alpha, h={name: -alpha * tensor - _of(start.kept, name) for name, tensor in start.weights.items()}
        )

    def keep(self, start: Start, sent: Tensors) -> dict[str, NDArray[np.float32]]:
        """∇_i - α Δ."""
        return {
            name: _rounded(name, _of(start.kept, name) - np.multiply(change, self.alpha, dtype=np.float64))
            for name, change in sent.items()
        }

    def metrics(self, start: Start) -> dict[str, float]:  # noqa: ARG002
        """α."""
        return {ALPHA: self.alpha}


def _of(tensors: Tensors, name: str) -> NDArray[np.float32]:
    return tensors[name] if tensors else np.zeros((), np.float32)


def _rounded(name: str, values: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        rounded = np.asarray(values, np.float32)
    if not np.isfinite(rounded).all():
        raise DivergedError(
            f"tensor {name!r}: expected a finite state of the algorithm, found one beyond float32: the training "
            "diverged or took too small steps; change the learning rate"
        )
    return rounded
