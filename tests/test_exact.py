"""Exact sums: what no order, no grouping and no block size changes."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_round
from hypothesis import given
from hypothesis import strategies as st

from fedpara_edge.aggregation import aggregate
from fedpara_edge.aggregation.bounds import UNBOUNDED
from fedpara_edge.aggregation.effort import Effort
from fedpara_edge.aggregation.exact import ExactSum
from fedpara_edge.algorithms import SERVER, find_server
from fedpara_edge.codecs import codec

HUGE = float(np.finfo(np.float32).max)
numbers = st.floats(-HUGE, HUGE, width=32)
weights = st.integers(-(1 << 140), 1 << 140)
terms = st.lists(st.tuples(numbers, weights), min_size=1, max_size=40)


def summed(pairs: list[tuple[float, int]], sum_: ExactSum | None = None) -> ExactSum:
    sum_ = sum_ or ExactSum(1)
    if pairs:
        sum_.add(np.array([[value] for value, _ in pairs], np.float32), [weight for _, weight in pairs])
    return sum_


def value_of(sum_: ExactSum) -> Fraction:
    return sum((int(digits[0]) * Fraction(2) ** (32 * level) for level, digits in sum_.digits().items()), Fraction(0))


@given(terms)
def test_a_sum_is_that_of_fractions(pairs: list[tuple[float, int]]) -> None:
    expected = sum((Fraction(value) * weight for value, weight in pairs), Fraction(0))
    found = summed(pairs)
    assert value_of(found) == expected
    if abs(expected) < Fraction(2) ** 1000:
        assert found.to_float()[0] == pytest.approx(float(expected), rel=2.0**-51, abs=0)


@given(terms, st.randoms(use_true_random=False), st.integers(0, 40))
def test_order_and_grouping_change_no_digit(pairs: list[tuple[float, int]], random: Any, cut: int) -> None:
    shuffled = random.sample(pairs, len(pairs))
    whole, one, other = summed(pairs), summed(shuffled[:cut]), summed(shuffled[cut:])
    for level, digits in other.digits().items():
        one.add_digits(level, digits)
    assert {level: digits.tolist() for level, digits in one.digits().items()} == {
        level: digits.tolist() for level, digits in whole.digits().items()
    }


@given(terms, terms)
def test_what_is_taken_away_leaves_nothing(pairs: list[tuple[float, int]], others: list[tuple[float, int]]) -> None:
    sum_ = summed([(value, -weight) for value, weight in others], summed(others, summed(pairs)))
    assert value_of(sum_) == value_of(summed(pairs))


@pytest.mark.parametrize("entries", [1, 255, 256, 257, 4096, 4097, 9000])
def test_a_sum_does_not_depend_on_those_beside_it(entries: int) -> None:
    random = np.random.default_rng(entries)
    values = (random.standard_normal((40, entries)) * 10.0 ** random.integers(-9, 9, entries)).astype(np.float32)
    counts = [int(count) for count in random.integers(1, 1 << 40, 40)]
    whole = ExactSum(entries)
    whole.add(values, counts)
    for entry in {0, 1, 254, 255, 256, 4095, 4096, entries - 1} & {*range(entries)}:
        alone = summed([(float(value), count) for value, count in zip(values[:, entry], counts, strict=True)])
        found = sum(int(digits[entry]) * Fraction(2) ** (32 * level) for level, digits in whole.digits().items())
        assert found == value_of(alone), entry


def test_many_additions_overflow_nothing() -> None:
    sum_, value = ExactSum(3), np.full((32, 3), -HUGE, np.float32)
    for _ in range(600):
        sum_.add(value, [(1 << 32) - 1] * 32)
    assert value_of(sum_) == Fraction(-HUGE) * ((1 << 32) - 1) * 32 * 600


@pytest.mark.parametrize("algorithm", sorted(SERVER))
def test_an_exact_round_is_the_usual_one_without_its_rounding(algorithm: str, tmp_path: Path) -> None:
    base = small_round.start_round(tmp_path, number=0)
    metrics = {"learning_rate_sum": 0.4, "alpha": 0.1}
    paths = [
        small_round.send(tmp_path, base, f"c{k}", examples=10 + k, metrics=metrics, codec=("float32", "int4")[k % 2])
        for k in range(9)
    ]
    server = find_server(algorithm, clients=9 if algorithm in ("scaffold", "feddyn") else None)
    usual, exact = (aggregate(paths, base, algorithm=server, exact=each) for each in (False, True))
    assert exact.accepted == usual.accepted
    for name, tensor in usual.weights.tensors.items():
        np.testing.assert_allclose(exact.weights.tensors[name], tensor, rtol=1e-5, atol=1e-6)
    for group, tensors in (usual.state.groups if usual.state else {}).items():
        for name, tensor in tensors.items():
            np.testing.assert_allclose(exact.state.groups[group][name], tensor, rtol=1e-4, atol=1e-6)  # type: ignore[union-attr]


def test_a_round_in_which_bounds_bind(tmp_path: Path) -> None:
    base = small_round.start_round(tmp_path)
    paths = [small_round.send(tmp_path, base, f"c{k}", examples=10 + k) for k in range(5)]
    large = {name: 50 * value for name, value in small_round.random_tensors(base.layout, 3, 0.1).items()}
    paths.append(small_round.send(tmp_path, base, "large", change=large))
    paths.append(small_round.send(tmp_path, base, "greedy", examples=1 << 40))
    usual, exact = (aggregate(paths, base, exact=each) for each in (False, True))
    assert {update.client: update.bounded for update in exact.accepted if update.bounded} == {
        "greedy": ("examples", "share"),
        "large": ("norm",),
    }
    assert exact.accepted == usual.accepted
    for name, tensor in usual.weights.tensors.items():
        np.testing.assert_allclose(exact.weights.tensors[name], tensor, rtol=1e-5, atol=1e-6)
    free = aggregate(paths, base, exact=True, bounds=UNBOUNDED)
    assert free.weights.base != exact.weights.base


def test_neither_blocks_nor_threads_nor_chunks_change_a_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = small_round.start_round(tmp_path)
    paths = [small_round.send(tmp_path, base, f"c{k}", examples=7 * k + 1) for k in range(12)]
    found = {
        aggregate(paths, base, exact=True, effort=Effort(block_files=k, threads=1 + k % 3)).weights.base
        for k in (1, 5, 40)
    }
    monkeypatch.setattr(codec, "CHUNK_ENTRIES", 16)  # of which files have a sum each
    paths = [small_round.send(tmp_path, base, f"c{k}", examples=7 * k + 1) for k in range(12)]
    assert found == {aggregate(paths, base, exact=True).weights.base}
