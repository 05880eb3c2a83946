"""How examples of one data set are dealt to clients, for experiments on one machine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.errors import InputError

_TRIES = 1000


def dirichlet(
    labels: NDArray[np.integer], *, clients: int, alpha: float, seed: int, least: int = 1
) -> list[NDArray[np.intp]]:
    """Deal every example to one client, each class in proportions drawn from a symmetric Dirichlet(α).

    The smaller α, the fewer classes a client sees. Drawn anew until every client has at least `least` examples.

    Args:
        labels: class of each example, int [N].
        clients: how many there are.
        alpha: concentration; 0.5 in the paper's non-iid experiments (section 3.1).
        seed: decides the result.
        least: smallest number of examples of a client.

    Returns:
        For each client the rows of its examples, ascending.

    Raises:
        InputError: an argument is out of range, or no draw gave every client enough examples.

    >>> rows = dirichlet(np.arange(100) % 10, clients=4, alpha=0.5, seed=0)
    >>> sorted(np.concatenate(rows).tolist()) == list(range(100))
    True
    """
    if clients < 1 or alpha <= 0 or least * clients > len(labels):
        raise InputError(
            f"partition: expected at least 1 client, a positive α and {least} examples for each client, "
            f"found {clients} clients, α {alpha} and {len(labels)} examples"
        )
    generator = np.random.default_rng(seed)
    for _ in range(_TRIES):
        owner = np.empty(len(labels), np.intp)
        for label in np.unique(labels):
            rows = generator.permutation(np.flatnonzero(labels == label))
            shares = np.cumsum(generator.dirichlet(np.full(clients, alpha)))
            owner[rows] = np.searchsorted(np.round(shares[:-1] * len(rows)), np.arange(len(rows)), side="right")
        if np.bincount(owner, minlength=clients).min() >= least:
            return [np.flatnonzero(owner == client) for client in range(clients)]
    raise InputError(
        f"partition: expected {least} examples for each of {clients} clients, found none such in {_TRIES} draws; "
        "take fewer clients or a larger α"
    )
