"""Devices that are not as one wishes: they go away while they train, or are too slow for the round.

A device takes its examples times its slowness, which is drawn once for each client: between 1 and `slowest`, its
logarithm evenly. A round lasts `deadline` times as long as the median participant takes of those that stay. Who goes
away or is later has got the weights, and what it did is lost: it sends nothing, and its state is as before.

All draws are decided by the seed, so that all arms of a plan have the same devices; no time is waited for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import numpy as np

from fedpara_edge.options import check, option

GONE = "node_unavailable"
"""Reason of a participant that went away."""
LATE = "late"
"""Reason of one that was too slow."""
_SPEEDS, _LOSSES = 5, 6
"""Keys of the draws, which set them apart from others of the seed."""


@dataclass(frozen=True, kw_only=True)
class DevicesPlan:
    """The [devices] table of a plan.

    Args:
        dropout: Share of the participants of each round that go away before they answer, rounded down.
        slowest: Time that the slowest device takes for an example, in those of the fastest.
        deadline: Time that a round takes, in those of its median participant; None to wait for all.

    Raises:
        InputError: A value is out of its range; the error has its key.
    """

    dropout: float = option(
        0.0, minimum=0, below=1, help="Share of each round's participants that go away before they answer."
    )
    slowest: float = option(1.0, minimum=1, help="Time of the slowest device for an example, in those of the fastest.")
    deadline: float | None = option(
        None, minimum=1, unset="all are waited for", help="Time of a round, in those of its median participant."
    )

    def __post_init__(self) -> None:
        check(self)

    def missing(
        self, examples: Mapping[str, int], numbers: Mapping[str, int], *, seed: int, round: int
    ) -> dict[str, str]:
        """Participants of a round that send nothing, with the reason of each; never all of them.

        Args:
            examples: Number of training examples of each participant.
            numbers: Number of each client, from 0 on.
            seed: Seed of the run.
            round: Round that they train in, from 0 on.

        >>> DevicesPlan(dropout=0.5).missing({"a": 9, "b": 9, "c": 9}, {"a": 0, "b": 1, "c": 2}, seed=0, round=0)
        {'b': 'node_unavailable'}
        """
        if not self.dropout and self.deadline is None:
            return {}
        clients = list(examples)
        generator = np.random.Generator(np.random.PCG64([seed, round, _LOSSES]))
        gone = generator.choice(len(clients), int(self.dropout * len(clients)), replace=False)
        found = {clients[number]: GONE for number in sorted(gone)}
        if self.deadline is not None:
            stay = [client for client in clients if client not in found]
            times = {client: examples[client] * self._slowness(numbers[client], seed) for client in stay}
            limit = self.deadline * median(times.values())
            found |= {client: LATE for client in stay if times[client] > limit}
        return found

    def _slowness(self, number: int, seed: int) -> float:
        draw = np.random.SeedSequence([seed, number], spawn_key=(_SPEEDS,)).generate_state(1)[0] / 2**32
        return float(self.slowest**draw)
