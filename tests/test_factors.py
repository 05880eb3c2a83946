"""What factors compose to, against the formulas written out entry by entry."""

import math

import numpy as np
import pytest
import small_round
from numpy.typing import NDArray

from fedpara_edge.factors.compose import attainable_rank, compose, factor_count, factor_role, factor_shapes
from fedpara_edge.factors.layout import Form, Kind, LayerSpec

SHAPES = [(5, 4), (1, 7), (4, 3, 3, 2), (2, 5, 1, 1), (3, 1, 3, 3)]


def spec(shape: tuple[int, ...], form: Form, kind: Kind, rank: int, tanh: bool) -> LayerSpec:
    operator = "linear" if len(shape) == 2 else "conv2d"
    return LayerSpec(name="layer", operator=operator, kind=kind, form=form, shape=shape, rank=rank, tanh=tanh)


def random_factors(layer: LayerSpec) -> dict[str, NDArray[np.float64]]:
    random = np.random.default_rng(3)
    return {part: random.standard_normal(shape) for part, shape in factor_shapes(layer).items()}


def branch(layer: LayerSpec, factors: dict[str, NDArray[np.float64]], index: int) -> NDArray[np.float64]:
    x, y = factors[f"x{index}"], factors[f"y{index}"]
    if layer.form == "matrix":
        return np.array([[math.fsum(a * b for a, b in zip(p, q, strict=True)) for q in y] for p in x])
    core = factors[f"t{index}"]
    weight = np.zeros(layer.shape)
    for o, i, k, l in np.ndindex(*layer.shape):  # noqa: E741  (the field's index)
        weight[o, i, k, l] = sum(
            core[a, b, k, l] * x[o, a] * y[i, b] for a in range(layer.rank) for b in range(layer.rank)
        )
    return weight


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize(
    ("kind", "tanh"), [("fedpara", False), ("fedpara", True), ("pfedpara", False), ("lowrank", False)]
)
@pytest.mark.parametrize(
    ("shape", "form"),
    [(shape, form) for shape in SHAPES for form in ("matrix", "tensor") if len(shape) == 4 or form == "matrix"],
)
def test_composed_is_the_formula(shape: tuple[int, ...], form: Form, kind: Kind, tanh: bool, rank: int) -> None:
    layer = spec(shape, form, kind, rank, tanh)
    factors = random_factors(layer)
    first = branch(layer, factors, 1).reshape(shape)
    second = branch(layer, factors, 2).reshape(shape) if kind != "lowrank" else None
    if second is None:
        expected = first
    elif kind == "pfedpara":
        expected = first * (second + 1)
    else:
        expected = np.tanh(first) * np.tanh(second) if tanh else first * second
    found = compose(layer, factors, np.tanh)
    assert found.shape == shape
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert factor_count(layer) == sum(factor.size for factor in factors.values())


def test_a_dense_weight_is_itself() -> None:
    layer = small_round.layer("fc", (3, 4), kind="dense")
    weight = np.ones((3, 4))
    assert compose(layer, {"weight": weight}, np.tanh) is weight
    assert factor_shapes(layer) == {"weight": (3, 4)}


def test_counts_of_table_1() -> None:
    linear = spec((256, 256), "matrix", "fedpara", 16, False)
    conv = spec((256, 256, 3, 3), "tensor", "fedpara", 16, False)
    reshaped = spec((256, 256, 3, 3), "matrix", "fedpara", 16, False)
    assert factor_count(linear) == 2 * 16 * 512 == 16_384
    assert factor_count(conv) == 2 * 16 * (512 + 16 * 9) == 20_992
    assert factor_count(reshaped) == 2 * 16 * (256 + 256 * 9) == 81_920


def test_a_hadamard_product_of_rank_10_factors_has_rank_100() -> None:
    layer = spec((100, 100), "matrix", "fedpara", 10, False)
    assert np.linalg.matrix_rank(compose(layer, random_factors(layer), np.tanh)) == attainable_rank(layer) == 100
    layer = spec((100, 100), "matrix", "lowrank", 20, False)
    assert np.linalg.matrix_rank(compose(layer, random_factors(layer), np.tanh)) == attainable_rank(layer) == 20


def test_only_the_second_factors_of_pfedpara_are_personal() -> None:
    for kind in ("fedpara", "pfedpara", "lowrank", "dense"):
        layer = small_round.layer("conv", (4, 3, 3, 3), kind=kind)
        personal = {part for part in factor_shapes(layer) if factor_role(layer, part) == "personal"}
        assert personal == ({"x2", "y2", "t2"} if kind == "pfedpara" else set())
