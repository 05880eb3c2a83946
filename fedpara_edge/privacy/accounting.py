"""The ε that rounds of the Gaussian mechanism come to, by Google's dp-accounting.

Rounds compose as privacy loss distributions (Doroshenko et al. 2022, arXiv 2207.04380), which dp-accounting rounds up,
for neighbours with one client more or less. With a sampling probability, each client takes part by a coin of its own
(Poisson sampling).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from dp_accounting import DpEvent, GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant

Spent = tuple[float, float]
"""Noise and sampling probability of a round (`mechanism.Gaussian`)."""


def epsilon(rounds: Iterable[Spent], delta: float) -> float:
    """The ε of some rounds together at a δ."""
    accountant = PLDAccountant()
    for (noise, sampling), count in sorted(Counter(rounds).items()):
        event: DpEvent = GaussianDpEvent(noise)
        if sampling < 1:
            event = PoissonSampledDpEvent(sampling, event)
        accountant.compose(SelfComposedDpEvent(event, count))
    return float(accountant.get_epsilon(delta))
