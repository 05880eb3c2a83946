"""The distance between the mean of the factors and the mean of the weights."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import small_round
from numpy.typing import NDArray

from fedpara_edge.aggregation import aggregate
from fedpara_edge.aggregation.gap import Gap, GapEstimator
from fedpara_edge.aggregation.weightsample import evenly, sample_layer
from fedpara_edge.codecs.changes import Changes
from fedpara_edge.factors.compose import compose, compose_branch, factor_shapes
from fedpara_edge.factors.layout import LayerSpec, Layout

Tensors = dict[str, NDArray[np.float32]]

LINEAR = small_round.layer("fc", (256, 256), rank=30)


def drifting(
    layout: Layout, clients: int, drift: float, *, common: float = 0.0, only: str = ""
) -> tuple[Tensors, list[Tensors]]:
    """Gaussian factors, and changes of independent clients around a common one; of factors that end in `only`."""
    base = small_round.random_tensors(layout, 1)
    shared = small_round.random_tensors(layout, 2, common)
    changes = []
    for client in range(clients):
        own = small_round.random_tensors(layout, 100 + client, drift)
        changes.append({name: (own[name] + shared[name]) * np.float32(name.endswith(only)) for name in own})
    return base, changes


def estimated(
    layout: Layout,
    base: Tensors,
    changes: list[Tensors],
    shares: NDArray[np.float64],
    piece: int,
    **budget: int,
) -> Gap:
    """The gap as it is gathered: in blocks of three updates, and in pieces of so many entries."""
    estimator = GapEstimator(layout, base, updates=len(changes), **budget)
    flat = np.stack([small_round.flat(change) for change in changes]).astype(np.float32)
    for first in range(0, len(changes), 3):
        block = flat[first : first + 3]
        estimator.start_block(len(block))
        for start in reversed(range(0, flat.shape[1], piece)):  # threads keep no order
            estimator.collect(start, Changes(block[:, start : start + piece]))
        for thread in range(2):
            estimator.finish_block(shares[first : first + 3], thread, 2)
    result = estimator.result(shares @ flat)
    assert result is not None
    return result


def exact(layer: LayerSpec, base: Tensors, changes: list[Tensors], shares: NDArray[np.float64]) -> float:
    """The gap of one layer by its definition, of all of its entries."""

    def weight(change: Tensors) -> NDArray[np.float64]:
        factors = {
            part: base[name].astype(np.float64) + change[name]
            for part in factor_shapes(layer)
            if (name := f"{layer.name}.{part}") in base
        }
        if layer.kind == "pfedpara":
            return np.asarray(compose_branch(layer, factors, 1))
        return np.asarray(compose(layer, factors, np.tanh))

    mean_change = {
        name: sum(share * change[name].astype(np.float64) for share, change in zip(shares, changes, strict=True))
        for name in base
    }
    mean_weight = sum(share * weight(change) for share, change in zip(shares, changes, strict=True))
    moved = np.linalg.norm(mean_weight - weight({name: np.zeros_like(value) for name, value in base.items()}))
    return float(np.linalg.norm(weight(mean_change) - mean_weight) / moved)


def equal_shares(count: int) -> NDArray[np.float64]:
    return np.full(count, 1 / count)


@pytest.mark.parametrize(("drift", "percent"), [(0.05, 5.9), (0.1, 11.8), (0.3, 34)])
def test_close_to_the_exact_one_on_the_drifts_we_measured_before(drift: float, percent: float) -> None:
    layout = small_round.layout_of(LINEAR)
    base, changes = drifting(layout, 16, drift)
    found = estimated(layout, base, changes, equal_shares(16), 10_000)
    truth = exact(LINEAR, base, changes, equal_shares(16))
    assert 100 * truth == pytest.approx(percent, rel=0.05)
    assert found.relative == pytest.approx(truth, rel=0.25)
    assert (found.entries, found.layers[0].entries, found.layers[0].exact) == (256, 256, False)


@pytest.mark.parametrize(
    "layer",
    [
        LINEAR,
        small_round.layer("conv", (64, 48, 3, 3), rank=22),
        small_round.layer("conv", (64, 48, 3, 3), rank=80),
        small_round.layer("conv", (64, 48, 3, 3), rank=22, kind="lowrank"),
        small_round.layer("conv", (64, 48, 3, 3), rank=22, kind="pfedpara"),
        small_round.layer("fc", (100, 300), rank=10, tanh=True),
        LayerSpec(name="conv", operator="conv2d", kind="fedpara", form="matrix", shape=(64, 9, 3, 3), rank=8),
    ],
    ids=lambda layer: f"{layer.kind}-{layer.operator}-{layer.form}-{layer.rank}",
)
@pytest.mark.parametrize("common", [0, 0.3])
def test_close_to_the_exact_one_for_every_kind(layer: LayerSpec, common: float) -> None:
    layout = small_round.layout_of(layer)
    base, changes = drifting(layout, 10, 0.1, common=common)
    shares = np.arange(1.0, 11) / 55
    found = estimated(layout, base, changes, shares, 1000)
    assert found.relative == pytest.approx(exact(layer, base, changes, shares), rel=0.3)


@pytest.mark.parametrize("layer", small_round.LAYERS[:3], ids=lambda layer: layer.name)
def test_exact_for_a_layer_no_larger_than_the_sample(layer: LayerSpec) -> None:
    layout = small_round.layout_of(layer)
    base, changes = drifting(layout, 7, 0.3)
    shares = np.arange(1.0, 8) / 28
    (found,) = estimated(layout, base, changes, shares, 5).layers
    assert found.relative == pytest.approx(exact(layer, base, changes, shares), rel=1e-6)
    assert (found.exact, found.entries) == (True, layer.dense_parameters)


@pytest.mark.parametrize("layer", [LINEAR, *small_round.LAYERS[:3]], ids=lambda layer: layer.name)
def test_no_gap_if_one_factor_moved_or_all_moved_alike_or_one_client_came(layer: LayerSpec) -> None:
    layout = small_round.layout_of(layer)
    for part in factor_shapes(layer):
        found = estimated(layout, *drifting(layout, 9, 0.3, only=part), equal_shares(9), 999)
        assert found.relative < 1e-9, part
    assert estimated(layout, *drifting(layout, 9, 0, common=0.5), equal_shares(9), 999).relative < 1e-9
    assert estimated(layout, *drifting(layout, 1, 0.5), equal_shares(1), 999).relative < 1e-9
    assert estimated(layout, *drifting(layout, 3, 0), equal_shares(3), 999).relative == 0


def test_two_clients_that_flip_signs_agree_on_the_weight_and_not_on_the_factors() -> None:
    layer = small_round.layer("fc", (3, 3), rank=1, kind="lowrank")
    layout = small_round.layout_of(layer)
    base = {t.name: np.ones(t.shape, np.float32) for t in layout.shared}
    still = {name: np.zeros_like(value) for name, value in base.items()}
    flipped = {name: -2 * value for name, value in base.items()}
    found = estimated(layout, base, [still, flipped], equal_shares(2), 100)
    assert found.relative == np.inf
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert plain == {
        "relative": None,
        "entries": 9,
        "layers": [{"layer": "fc", "relative": None, "entries": 9, "exact": True}],
    }


def test_a_layer_counts_by_its_size() -> None:
    large, small = small_round.layer("large", (64, 64), rank=4), small_round.layer("small", (16, 16), rank=4)
    layout = small_round.layout_of(large, small)
    base, changes = drifting(layout, 8, 0.2)
    for change in changes:
        for name in change:
            change[name] *= np.float32(name.startswith("small"))
    found = estimated(layout, base, changes, equal_shares(8), 100)
    assert [layer.relative > 0.01 for layer in found.layers] == [False, True]
    assert found.relative == pytest.approx(found.layers[1].relative)


def test_layers_are_left_out_evenly_where_they_cost_too_much() -> None:
    layers = [small_round.layer(f"fc{number}", (20, 20), rank=3) for number in range(9)]
    layout = small_round.layout_of(*layers)
    one = sample_layer(layout, layers[0])
    assert one is not None
    assert one.factor_entries == 4 * 16 * 3
    for affordable, kept in ((9, range(9)), (3, [1, 4, 7]), (1, [4]), (0, [4])):
        entries = affordable * one.factor_entries
        found, *others = (
            estimated(layout, *drifting(layout, 3, 0.1), equal_shares(3), 100, **budget)
            for budget in (
                {"least_entries": 0, "update_entries": entries},
                {"least_entries": 0, "all_entries": 3 * entries},
                {"least_entries": entries, "all_entries": 0},
            )
        )
        assert [layer.layer for layer in found.layers] == [f"fc{number}" for number in kept]
        assert others == [found, found]


def test_only_branches_that_travel_are_compared(tmp_path: Path) -> None:
    dense = small_round.layout_of(small_round.layer("head", (3, 5), kind="dense"))
    assert GapEstimator(dense, small_round.random_tensors(dense, 1), updates=2).result(np.zeros(18)) is None
    weights = small_round.start_round(tmp_path, dense)
    result = aggregate([small_round.send(tmp_path, weights, client) for client in "ab"], weights)
    assert result.gap is None
    assert result.to_json()["gap"] is None
    layer = small_round.layer("fc", (8, 9))
    whole = small_round.layout_of(layer)
    for name in ("fc.x1", "fc.y2"):
        tensors = tuple(dataclasses.replace(t, role="frozen") if t.name == name else t for t in whole.tensors)
        sample = sample_layer(Layout(whole.layers, tensors), layer)
        assert sample is not None
        assert sample.branches == (2 if name == "fc.x1" else 1,)


def test_aggregate_measures_it(tmp_path: Path) -> None:
    layer = small_round.layer("conv", (16, 12, 3, 3), rank=5)
    layout = small_round.layout_of(layer)
    weights = small_round.start_round(tmp_path, layout)
    _, changes = drifting(layout, 23, 0.2)
    paths = [
        small_round.send(tmp_path, weights, f"{number:02}", change=change, examples=number + 1)
        for number, change in enumerate(changes)
    ]
    found = aggregate(paths, weights).gap
    assert found is not None
    shares = np.arange(1.0, 24) / (23 * 12)
    assert found.relative == pytest.approx(exact(layer, dict(weights.tensors), changes, shares), rel=1e-6)
    assert found.entries == layer.dense_parameters


def test_evenly() -> None:
    assert [evenly(9, most).tolist() for most in (0, 1, 2, 3)] == [[4], [4], [2, 6], [1, 4, 7]]
    assert evenly(4, 100).tolist() == [0, 1, 2, 3]
    assert evenly(0, 3).tolist() == []
