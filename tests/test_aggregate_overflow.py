"""Values at the end of float32, and beyond it: whose fault they are, and that the mean stays finite."""

from pathlib import Path

import numpy as np
import pytest
import small_round
from means import METRICS, UNIT, codes, constant, forge_value, written

from fedpara_edge.aggregation import aggregate
from fedpara_edge.aggregation.bounds import UNBOUNDED
from fedpara_edge.aggregation.effort import Effort
from fedpara_edge.algorithms import ServerAlgorithm
from fedpara_edge.algorithms.adaptive import FedAdagrad, FedAdam
from fedpara_edge.algorithms.fedavg import FedAvgServer
from fedpara_edge.algorithms.fedavgm import FedAvgM
from fedpara_edge.algorithms.scaffold import ScaffoldServer
from fedpara_edge.errors import FedparaError, InvalidUpdateError, WrongBundleError
from fedpara_edge.factors.layout import Layout
from fedpara_edge.formats.weights import Weights, read_weights, write_weights

HUGE = float(np.finfo(np.float32).max)


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    return small_round.start_round(tmp_path)


def test_huge_values_that_cancel_are_nobodys_fault(tmp_path: Path, weights: Weights, effort: Effort) -> None:
    changes = {"a": HUGE, "b": -HUGE, "c": HUGE, "d": -HUGE, "e": 0.5}
    paths = [small_round.send(tmp_path, weights, c, change=constant(weights, v)) for c, v in changes.items()]
    result = aggregate(paths, weights, bounds=UNBOUNDED, effort=effort)
    assert result.rejected == ()
    moved = small_round.flat(result.weights.tensors) - small_round.flat(weights.tensors)
    assert np.abs(moved).max() <= 21 * UNIT * HUGE


def test_the_largest_float32_everywhere_stays_finite(tmp_path: Path, effort: Effort) -> None:
    layout = Layout((), (small_round.tensor("a", (300,)),))
    path = tmp_path / "base"
    write_weights(path, Weights("0", 0, layout, {"a": np.zeros(300, np.float32)}))
    weights = read_weights(path)
    paths = [small_round.send(tmp_path, weights, c, change=constant(weights, HUGE)) for c in "abcdefg"]
    result = aggregate(paths, weights, effort=effort)
    assert result.rejected == ()
    np.testing.assert_allclose(result.weights.tensors["a"], HUGE, rtol=1e-6)


def test_a_change_that_makes_weights_infinite_is_refused_by_name(tmp_path: Path, effort: Effort) -> None:
    layout = Layout((), (small_round.tensor("a", (300,)), small_round.tensor("b", (3,))))
    path = tmp_path / "base"
    base = {"a": np.zeros(300, np.float32), "b": np.full(3, 0.9 * HUGE, np.float32)}
    write_weights(path, Weights("0", 0, layout, base))
    weights = read_weights(path)
    good = [small_round.send(tmp_path, weights, client) for client in ("a", "c")]
    bad = []
    for client in ("b", "d"):
        change = small_round.random_tensors(layout, 3)
        change["b"][1] = HUGE
        bad.append(small_round.send(tmp_path, weights, client, change=change))
    result = aggregate([*good, *bad], weights, effort=effort)
    assert codes(result.rejected) == {"b.update": "overflow", "d.update": "overflow"}
    assert "tensor 'b': expected a change that leaves the weights finite" in result.rejected[0].reason
    assert written(tmp_path, result) == written(tmp_path, aggregate(good, weights, effort=effort))
    with pytest.raises(InvalidUpdateError, match="too large for float32"):
        aggregate([*good, *bad], weights, strict=True, effort=effort)


def test_nan_among_huge_values_is_the_fault_of_one(tmp_path: Path, weights: Weights, effort: Effort) -> None:
    huge = [
        small_round.send(tmp_path, weights, client, change=constant(weights, value))
        for client, value in (("a", 1e38), ("c", -1e38))
    ]
    bad = [forge_value(tmp_path, weights, client, np.nan) for client in ("b", "d", "e", "f")]
    result = aggregate([*huge, *bad], weights, effort=effort)
    assert [update.client for update in result.accepted] == ["a", "c"]
    assert set(codes(result.rejected).values()) == {"not_finite"}
    assert written(tmp_path, result) == written(tmp_path, aggregate(huge, weights, effort=effort))


def test_weights_that_are_not_finite_are_not_the_updates_fault(tmp_path: Path, weights: Weights) -> None:
    path = small_round.send(tmp_path, weights, "a")
    tensors = {**weights.tensors, "fc.x1": np.full((6, 2), np.nan, np.float32)}
    broken = Weights(weights.fingerprint, weights.round, weights.layout, tensors)
    broken.__dict__["base"] = weights.base
    with pytest.raises(WrongBundleError, match="weights: expected finite tensors"):
        aggregate([path], broken)


TOO_LARGE: dict[str, tuple[ServerAlgorithm, float, float, dict[str, float]]] = {
    "control": (ScaffoldServer(clients=9), 0.0, 1e30, {"learning_rate_sum": 1e-20}),
    "second moment": (FedAdam(), 0.0, 1e30, {}),
    "sum of squares": (FedAdagrad(), 0.0, -1e20, {}),
    "weights": (FedAvgM(), 0.9 * HUGE, HUGE, {}),
}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_an_update_too_large_for_what_is_kept_is_refused(case: str, tmp_path: Path) -> None:
    algorithm, start, value, metrics = TOO_LARGE[case]
    layout = Layout((), (small_round.tensor("a", (300,)), small_round.tensor("b", (3,))))
    base = {"a": np.zeros(300, np.float32), "b": np.full(3, start, np.float32)}
    write_weights(tmp_path / "base", Weights("0", 0, layout, base))
    weights = read_weights(tmp_path / "base")
    good = [small_round.send(tmp_path, weights, client, metrics={**METRICS, **metrics}) for client in "ac"]
    change = {**small_round.random_tensors(layout, 3), "b": np.full(3, value, np.float32)}
    bad = small_round.send(tmp_path, weights, "b", change=change, metrics=metrics)
    result = aggregate([*good, bad], weights, algorithm=algorithm, bounds=UNBOUNDED)
    assert codes(result.rejected) == {"b.update": "overflow"}
    assert "tensor 'b': expected a change that leaves" in result.rejected[0].reason
    assert written(tmp_path, result) == written(tmp_path, aggregate(good, weights, algorithm=algorithm))


@pytest.mark.parametrize("algorithm", [FedAvgServer(lr=1e39), FedAdam(lr=1e39)], ids=["fedavg", "fedadam"])
def test_a_step_that_leaves_float32_is_nobodys_fault(algorithm: ServerAlgorithm, tmp_path: Path) -> None:
    weights = small_round.start_round(tmp_path, number=0)
    path = small_round.send(tmp_path, weights, "a")
    message = f"expected finite weights after the step of algorithm {algorithm.name}, found one beyond float32; lower"
    with pytest.raises(FedparaError, match=message):
        aggregate([path], weights, algorithm=algorithm)
