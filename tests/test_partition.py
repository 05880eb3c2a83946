"""Dealing examples to clients."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from fedpara_edge.errors import InputError
from fedpara_edge.simulation.data.partition import by_key, dirichlet, iid, shards

LABELS = np.random.default_rng(0).integers(0, 10, 3000)


@pytest.mark.parametrize("clients", [1, 7, 3000])
def test_iid_deals_every_example_evenly(clients: int) -> None:
    rows = iid(3000, clients=clients, seed=1)
    assert sorted(np.concatenate(rows).tolist()) == list(range(3000))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1
    assert all((np.diff(mine) > 0).all() for mine in rows)


def test_iid_clients_have_every_class_in_its_share() -> None:
    for rows in iid(len(LABELS), clients=3, seed=0):
        assert np.bincount(LABELS[rows], minlength=10).min() > 60


@pytest.mark.parametrize(("clients", "pieces"), [(10, 2), (7, 3), (1, 1), (50, 1)])
def test_shards_deal_every_example_in_few_classes(clients: int, pieces: int) -> None:
    rows = shards(LABELS, clients=clients, shards=pieces, seed=1)
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(LABELS)))
    assert max(map(len, rows)) - min(map(len, rows)) <= pieces
    assert all((np.diff(mine) > 0).all() for mine in rows)
    longest = -(-len(LABELS) // (clients * pieces))
    classes_of_a_piece = 2 + longest // np.bincount(LABELS).min()
    assert max(len(np.unique(LABELS[mine])) for mine in rows) <= pieces * classes_of_a_piece


def test_by_key_gives_each_owner_its_rows() -> None:
    found = by_key(LABELS)
    assert list(found) == list(range(10))
    for owner, rows in found.items():
        np.testing.assert_array_equal(rows, np.flatnonzero(owner == LABELS))
    assert by_key(LABELS[:0]) == {}


@pytest.mark.parametrize("alpha", [0.1, 0.5, 100.0])
def test_every_example_goes_to_one_client(alpha: float) -> None:
    rows = dirichlet(LABELS, clients=7, alpha=alpha, seed=1, min_examples=5)
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(LABELS)))
    assert min(map(len, rows)) >= 5


@pytest.mark.parametrize(
    "deal",
    [
        lambda seed: dirichlet(LABELS, clients=4, alpha=0.5, seed=seed),
        lambda seed: iid(len(LABELS), clients=4, seed=seed),
        lambda seed: shards(LABELS, clients=4, shards=2, seed=seed),
    ],
    ids=["dirichlet", "iid", "shards"],
)
def test_seed_decides(deal: Callable[[int], list[NDArray[np.intp]]]) -> None:
    first, same, other = map(deal, (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_small_alpha_concentrates_classes() -> None:
    def share_of_largest_class(alpha: float) -> float:
        rows = dirichlet(LABELS, clients=5, alpha=alpha, seed=3)
        return float(np.mean([np.bincount(LABELS[r]).max() / len(r) for r in rows]))

    assert share_of_largest_class(0.05) > 0.4 > share_of_largest_class(100.0)


@pytest.mark.parametrize(("clients", "alpha", "least"), [(0, 0.5, 1), (3, 0.0, 1), (10, 0.5, 301), (10, 0.01, 290)])
def test_impossible_requests_are_refused(clients: int, alpha: float, least: int) -> None:
    with pytest.raises(InputError, match="partition: expected"):
        dirichlet(LABELS, clients=clients, alpha=alpha, seed=0, min_examples=least)


@pytest.mark.parametrize(("clients", "pieces"), [(0, 1), (1, 0), (-2, -2), (1501, 2)])
def test_impossible_pieces_are_refused(clients: int, pieces: int) -> None:
    with pytest.raises(InputError, match="partition: expected 1 to 3000 shards"):
        shards(LABELS, clients=clients, shards=pieces, seed=0)
    with pytest.raises(InputError, match="partition: expected 1 to 3 clients"):
        iid(3, clients=clients if clients < 1 else clients + 3, seed=0)
