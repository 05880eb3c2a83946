"""Refitted factors compose to what is nearest to the mean of the weights, and never to anything farther."""

from pathlib import Path

import numpy as np
import pytest
import small_round
from norms import relative_error

from fedpara_edge.aggregation.refit import fit, refit
from fedpara_edge.codecs.codec import in_order
from fedpara_edge.factors.compose import compose, factor_shapes
from fedpara_edge.factors.layout import LayerSpec
from fedpara_edge.factors.linearization import Factors, Linearization
from fedpara_edge.formats.update import Update, open_update
from fedpara_edge.formats.weights import Weights

LAYERS = {
    "matrix": small_round.layer("a", (9, 8), rank=3),
    "tensor": small_round.layer("a", (6, 5, 3, 2), rank=2),
    "tanh": small_round.layer("a", (9, 8), rank=3, tanh=True),
    "tensor, tanh": small_round.layer("a", (6, 5, 3, 2), rank=2, tanh=True),
    "pfedpara": small_round.layer("a", (9, 8), kind="pfedpara", rank=3),
    "low-rank": small_round.layer("a", (9, 8), kind="lowrank", rank=4),
    "low-rank tensor": small_round.layer("a", (6, 5, 3, 2), kind="lowrank", rank=3),
}
every_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


def draw(layer: LayerSpec, seed: int, deviation: float = 1.0) -> Factors:
    random = np.random.default_rng(seed)
    return {part: deviation * random.standard_normal(shape) for part, shape in factor_shapes(layer).items()}


def moved(factors: Factors, direction: Factors, by: float) -> Factors:
    return {part: factors[part] + by * direction[part] for part in factors}


@every_layer
def test_the_linearization_is_the_derivative(layer: LayerSpec) -> None:
    factors, direction = draw(layer, 1), draw(layer, 2)
    here = Linearization(layer, factors)
    np.testing.assert_array_equal(here.weight, compose(layer, factors, np.tanh))
    ahead, behind = (compose(layer, moved(factors, direction, by), np.tanh) for by in (1e-6, -1e-6))
    np.testing.assert_allclose(here.push(direction), (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-7)


@every_layer
def test_pull_is_the_transpose_of_push(layer: LayerSpec) -> None:
    here, direction = Linearization(layer, draw(layer, 1)), draw(layer, 2)
    weight = np.random.default_rng(3).standard_normal(layer.shape)
    pulled = here.pull(weight)
    assert {part: array.shape for part, array in pulled.items()} == factor_shapes(layer)
    dot = sum(float(np.sum(direction[part] * pulled[part])) for part in pulled)
    assert dot == pytest.approx(float(np.sum(here.push(direction) * weight)), rel=1e-12)


@every_layer
def test_a_weight_that_can_be_reached_is_reached(layer: LayerSpec) -> None:
    factors = draw(layer, 1)
    target = compose(layer, moved(factors, draw(layer, 2), 0.02), np.tanh)
    found, errors = fit(layer, factors, target, steps=8, iterations=60)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4 * errors[0]
    np.testing.assert_allclose(np.sum((compose(layer, found, np.tanh) - target) ** 2), errors[-1], rtol=1e-6)


@every_layer
def test_a_weight_that_is_met_leaves_the_factors_as_they_are(layer: LayerSpec) -> None:
    factors = draw(layer, 1)
    found, errors = fit(layer, factors, compose(layer, factors, np.tanh))
    assert errors == [0.0]
    assert found is factors


@every_layer
def test_what_remains_is_a_minimum(layer: LayerSpec) -> None:
    factors = draw(layer, 1)
    target = compose(layer, factors, np.tanh) + 0.05 * np.random.default_rng(4).standard_normal(layer.shape)
    found, errors = fit(layer, factors, target, steps=8, iterations=60)
    assert errors[-1] < 0.9 * errors[0]
    before, after = (
        np.sqrt(sum(np.sum(g**2) for g in here.pull(target - here.weight).values()))
        for here in (Linearization(layer, factors), Linearization(layer, found))
    )
    assert after < 0.05 * before


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    return small_round.start_round(tmp_path)


def opened(folder: Path, weights: Weights, clients: str, **options: object) -> list[Update]:
    updates = [open_update(small_round.send(folder, weights, client, **options), weights) for client in clients]  # type: ignore[arg-type]
    for update in updates:
        update.close()
    return updates


def mean_of(clients: str, shares: np.ndarray, weights: Weights) -> np.ndarray:
    seeds = [int.from_bytes(client.encode(), "little") for client in clients]
    changes = [small_round.flat(small_round.random_tensors(weights.layout, seed, 0.1)) for seed in seeds]
    return np.asarray(shares @ np.array(changes))


def test_a_round_is_refitted_layer_by_layer_and_nothing_else_moves(tmp_path: Path, weights: Weights) -> None:
    shares = np.array([0.5, 0.3, 0.2])
    updates, mean = opened(tmp_path, weights, "abc"), mean_of("abc", shares, weights)
    result = refit(updates, shares, weights.layout, weights.tensors, mean)
    assert 0 < result.after < result.before
    offset = 0
    for tensor in in_order(weights.layout.shared):
        part = slice(offset, offset + tensor.size)
        same = np.array_equal(result.change[part], mean[part])
        assert same == (tensor.part in ("bias", "weight", "other")), tensor.name
        offset = part.stop


def test_one_update_has_no_gap(tmp_path: Path, weights: Weights) -> None:
    shares = np.ones(1)
    updates, mean = opened(tmp_path, weights, "a"), mean_of("a", shares, weights)
    result = refit(updates, shares, weights.layout, weights.tensors, mean)
    assert result.before < 1e-6
    np.testing.assert_allclose(result.change, mean, atol=1e-6)


def test_the_error_is_that_of_the_composed_weights(tmp_path: Path, weights: Weights) -> None:
    shares = np.array([0.5, 0.5])
    updates, mean = opened(tmp_path, weights, "ab"), mean_of("ab", shares, weights)
    result = refit(updates, shares, weights.layout, weights.tensors, mean)

    def composed(change: np.ndarray) -> np.ndarray:
        tensors, offset = {}, 0
        for tensor in in_order(weights.layout.shared):
            tensors[tensor.name] = weights.tensors[tensor.name] + change[offset : offset + tensor.size].reshape(
                tensor.shape
            )
            offset += tensor.size
        conv, fc, *_ = weights.layout.layers
        whole = [
            compose(layer, {part: tensors[f"{layer.name}.{part}"] for part in factor_shapes(layer)}, np.tanh).ravel()
            for layer in (conv, fc)
        ]
        return np.concatenate([*whole, (tensors["own.x1"] @ tensors["own.y1"].T).ravel()])

    base = composed(np.zeros_like(mean))
    target = sum(share * composed(mean_of(c, np.ones(1), weights)) for share, c in zip(shares, "ab", strict=True))
    for change, stated in ((mean, result.before), (result.change, result.after)):
        assert stated == pytest.approx(relative_error(composed(change) - base, target - base), rel=1e-4)
