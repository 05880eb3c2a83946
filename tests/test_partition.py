"""Dealing examples to clients."""

import numpy as np
import pytest

from fedpara_edge.errors import InputError
from fedpara_edge.partition import dirichlet

LABELS = np.random.default_rng(0).integers(0, 10, 3000)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 100.0])
def test_every_example_goes_to_one_client(alpha: float) -> None:
    rows = dirichlet(LABELS, clients=7, alpha=alpha, seed=1, least=5)
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(LABELS)))
    assert min(map(len, rows)) >= 5


def test_seed_decides() -> None:
    first, same, other = (dirichlet(LABELS, clients=4, alpha=0.5, seed=seed) for seed in (1, 1, 2))
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
        dirichlet(LABELS, clients=clients, alpha=alpha, seed=0, least=least)
