"""Ways to deal the examples of one data set to clients, for experiments on one machine.

iid        evenly, at random
dirichlet  each class in proportions drawn from a Dirichlet distribution
shards     sorted by class and cut into pieces, of which each client gets some
by_key     by owner: a writer, a subject, a role
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.errors import InputError, counted

_TRIES = 1000


def iid(examples: int, *, clients: int, seed: int) -> list[NDArray[np.intp]]:
    """Deal examples evenly and at random: the numbers of two clients differ by one at most.

    Args:
        examples: Number N of examples.
        clients: Number of clients.
        seed: Seed that decides the result.

    Returns:
        For each client the rows of its examples in [0, N), ascending.

    Raises:
        InputError: There are fewer examples than clients, or no client.

    >>> [len(rows) for rows in iid(10, clients=3, seed=0)]
    [4, 3, 3]
    """
    _check_pieces(examples, clients, "clients")
    shuffled = np.random.default_rng(seed).permutation(examples)
    return [np.sort(rows) for rows in np.array_split(shuffled, clients)]


def shards(labels: NDArray[np.integer], *, clients: int, shards: int, seed: int) -> list[NDArray[np.intp]]:
    """Sort the examples by class, cut them into equal pieces and deal every client some of these at random.

    So a client sees few classes: with 2 shards of balanced data, 2 in most cases and 4 at most (McMahan et al. 2017,
    section 3, and scenario 3 of the paper's section 3.4).

    Args:
        labels: Class of each example, int [N].
        clients: Number of clients.
        shards: Number of pieces of each client.
        seed: Seed that decides the result.

    Returns:
        For each client the rows of its examples, ascending.

    Raises:
        InputError: There are fewer examples than pieces, or no client or piece.

    >>> rows = shards(np.arange(100) % 10, clients=5, shards=2, seed=0)
    >>> [len(np.unique(mine % 10)) for mine in rows]
    [2, 2, 2, 2, 2]
    """
    _check_pieces(len(labels), clients * shards if min(clients, shards) > 0 else 0, "shards")
    pieces = np.array_split(np.argsort(labels, kind="stable"), clients * shards)
    dealt = np.random.default_rng(seed).permutation(len(pieces)).reshape(clients, shards)
    return [np.sort(np.concatenate([pieces[piece] for piece in mine])) for mine in dealt]


def by_key(keys: NDArray[Any]) -> dict[Any, NDArray[np.intp]]:
    """Give each owner its own examples.

    Args:
        keys: Owner of each example, integers or strings [N].

    Returns:
        For each owner, in ascending order, the rows of its examples, ascending.

    >>> {str(owner): rows.tolist() for owner, rows in by_key(np.array(["eve", "bob", "eve"])).items()}
    {'bob': [1], 'eve': [0, 2]}
    """
    owners, counts = np.unique(keys, return_counts=True)
    pieces = np.split(np.argsort(keys, kind="stable"), np.cumsum(counts)[:-1])
    return dict(zip(owners.tolist(), pieces, strict=True)) if len(owners) else {}


def dirichlet(
    labels: NDArray[np.integer], *, clients: int, alpha: float, seed: int, min_examples: int = 1
) -> list[NDArray[np.intp]]:
    """Deal every example to one client, each class in proportions drawn from a symmetric Dirichlet(α).

    The smaller α, the fewer classes a client sees. Drawn anew until every client has at least `min_examples` examples.

    Args:
        labels: Class of each example, int [N].
        clients: Number of clients.
        alpha: Concentration α; 0.5 in the paper's non-iid experiments (section 3.1).
        seed: Seed that decides the result.
        min_examples: Smallest number of examples of a client.

    Returns:
        For each client the rows of its examples, ascending.

    Raises:
        InputError: An argument is out of range, or no draw gave every client enough examples.

    >>> rows = dirichlet(np.arange(100) % 10, clients=4, alpha=0.5, seed=0)
    >>> sorted(np.concatenate(rows).tolist()) == list(range(100))
    True
    """
    if clients < 1 or alpha <= 0 or min_examples * clients > len(labels):
        raise InputError(
            f"partition: expected at least 1 client, a positive α and {counted(min_examples, 'example')} for each "
            f"client, found {counted(clients, 'client')}, α {alpha} and {counted(len(labels), 'example')}"
        )
    generator = np.random.default_rng(seed)
    for _ in range(_TRIES):
        owner = np.empty(len(labels), np.intp)
        for label in np.unique(labels):
            rows = generator.permutation(np.flatnonzero(labels == label))
            shares = np.cumsum(generator.dirichlet(np.full(clients, alpha)))
            owner[rows] = np.searchsorted(np.round(shares[:-1] * len(rows)), np.arange(len(rows)), side="right")
        if np.bincount(owner, minlength=clients).min() >= min_examples:
            return [np.flatnonzero(owner == client) for client in range(clients)]
    raise InputError(
        f"partition: expected {counted(min_examples, 'example')} for each of {counted(clients, 'client')}, found "
        f"none in {_TRIES} draws; "
        "take fewer clients or a larger α"
    )


def _check_pieces(examples: int, pieces: int, name: str) -> None:
    if not 1 <= pieces <= examples:
        raise InputError(
            f"partition: expected 1 to {examples} {name}, one for each example at most, found {pieces}; "
            "take another number or more data"
        )
