"""What a mechanism costs, and what pays for it, as those see it who ask for neither."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from fedpara_edge.privacy.mechanism import Gaussian


class Mechanism(Protocol):
    """What a release of a mechanism costs, and the budget that it is paid from."""

    @property
    def noise(self) -> float:
        """Standard deviation of the noise, in clips."""
        ...

    @property
    def sampling(self) -> float:
        """Probability with which a client takes part."""
        ...

    @property
    def epsilon(self) -> float:
        """Largest ε of all releases together."""
        ...

    @property
    def delta(self) -> float:
        """δ at which ε is measured."""
        ...


class Budget(Protocol):
    """What pays for releases."""

    def spend(self, mechanism: Mechanism, content: bytes, round: int, *, again: bool) -> bytes:
        """Pay for a release before it is made, or know it as paid `again`; return the secret key of its noise."""
        ...


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """A mechanism and what pays for it.

    Args:
        mechanism: Mechanism with its options.
        budget: Budget that a round is paid from.
        again: Whether there are files of the round, which are not to be paid for once more.
    """

    mechanism: Gaussian
    budget: Budget
    again: bool = False
