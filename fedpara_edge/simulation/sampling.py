"""The participants of a round and the seeds of the clients: the same in all arms of a plan, which pairs them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def draw_participants(clients: Sequence[str], count: int | None, *, seed: int, round: int) -> tuple[str, ...]:
    """The clients of one round, in the order of `clients`.

    Args:
        clients: Names of all clients.
        count: Number of participants; None for all.
        seed: Seed of the run.
        round: Round that they train in, from 0 on.

    >>> draw_participants(("a", "b", "c"), 2, seed=0, round=0)
    ('b', 'c')
    """
    if count is None or count == len(clients):
        return tuple(clients)
    generator = np.random.Generator(np.random.PCG64([seed, round]))
    return tuple(clients[number] for number in np.sort(generator.choice(len(clients), count, replace=False)))


def client_seed(seed: int, number: int) -> int:
    """The seed of a client's training, in [0, 2³²).

    Args:
        seed: Seed of the run.
        number: Number of the client, from 0 on.

    >>> client_seed(0, 1) == client_seed(0, 1) != client_seed(1, 1)
    True
    """
    return int(np.random.SeedSequence([seed, number], spawn_key=(3,)).generate_state(1)[0])
