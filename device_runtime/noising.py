"""Noise on the change of a device before anything of it leaves, paid for in a ledger in the state folder.

An update with noise states nothing else that depends on the data: it counts as one example and one step, and its
metrics are options of the algorithm. The noise is made from the secret of the ledger and from the clipped change, so
that a call which is done again releases the very same update, at no further cost; and an update is paid for before it
is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from device_runtime.state import DeviceState
from fedpara_edge.algorithms import ClientAlgorithm
from fedpara_edge.codecs.codec import flatten, in_order, not_finite, unflatten
from fedpara_edge.errors import DivergedError, InputError
from fedpara_edge.formats.update import UpdateHeader
from fedpara_edge.formats.weights import Weights
from fedpara_edge.privacy.budget import Budget
from fedpara_edge.privacy.ledger import FILE, PrivacyLedger
from fedpara_edge.privacy.local import LocalGaussian, check_algorithm, epsilon
from fedpara_edge.privacy.mechanism import check_layout


@dataclass(frozen=True, kw_only=True)
class Noising:
    """A mechanism, what pays for it, and the weights whose change it hides.

    Args:
        mechanism: Mechanism with its options.
        budget: Budget that an update is paid from.
        origin: Weights from which the training started.
    """

    mechanism: LocalGaussian
    budget: Budget
    origin: Weights

    @property
    def spent(self) -> float | None:
        """The ε of all updates so far; None where nobody keeps account."""
        return self.budget.spent(self.mechanism.delta) if isinstance(self.budget, PrivacyLedger) else None

    def header(self, header: UpdateHeader, metrics: Mapping[str, float]) -> UpdateHeader:
        """The header of an update that states its noise, and nothing that tells of the data.

        Args:
            header: Header without noise.
            metrics: Metrics of an algorithm that passed `check_algorithm`.
        """
        return replace(header, examples=1, steps=1, metrics=metrics, privacy=self.mechanism.to_json())

    def add(self, change: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """The change to send, float32 by shared tensor, once it is paid for.

        Raises:
            DivergedError: The change is not finite.
            BudgetError: Too little is left of the budget.
        """
        tensors = in_order(self.origin.layout.shared)
        if (bad := not_finite({tensor.name: change[tensor.name] for tensor in tensors})) is not None:
            raise DivergedError(
                f"tensor {bad!r}: expected a finite change, found NaN or Inf: the training diverged; lower the "
                "learning rate"
            )
        steps = self.mechanism.on_grid(flatten(tensors, change))
        content = self.mechanism.content(steps, self.origin.base)
        key = self.budget.spend(self.mechanism, content, self.origin.round, again=False)
        return unflatten(tensors, self.mechanism.noisy(steps, key))


def open_noising(
    mechanism: LocalGaussian,
    budget: Budget | None,
    kept: DeviceState | None,
    origin: Weights,
    algorithm: ClientAlgorithm,
) -> Noising:
    """The noising of a call.

    Args:
        mechanism: Mechanism with its options.
        budget: Budget that an update is paid from; None for the ledger in the state folder.
        kept: Open state folder.
        origin: Weights from which the training starts.
        algorithm: Algorithm of the training.

    Raises:
        InputError: There is no state folder, its ledger is damaged, the algorithm states more than a noisy change, or
            the model sends running statistics.
        BudgetError: Nothing is left of the budget.
    """
    check_algorithm(algorithm)
    check_layout(origin.layout)
    if budget is None:
        if kept is None:
            raise InputError(
                "expected a folder for the secret of the noise and what is spent, found none; pass --state",
                key="privacy",
            )
        budget = PrivacyLedger(kept.folder / FILE, epsilon)
        budget.check(mechanism, origin.round)
    return Noising(mechanism=mechanism, budget=budget, origin=origin)
