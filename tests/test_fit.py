"""Fitted factors: exact where that can be found, and nearer than low-rank factors of equal size."""

from itertools import product

import pytest
import torch

from fedpara_edge.errors import InputError
from fedpara_edge.factors.compose import compose, factor_count, factor_shapes
from fedpara_edge.factors.layout import KINDS, Form, Kind, LayerSpec
from fedpara_edge.factors.rank import equal_size_rank
from fedpara_edge.nn import fit_factors

torch.set_num_threads(1)  # the tensors are too small for threads to pay

SHAPES: list[tuple[tuple[int, ...], Form]] = [
    ((30, 40), "matrix"),
    ((64, 32, 3, 3), "matrix"),
    ((64, 32, 3, 3), "tensor"),
    ((16, 24, 1, 1), "tensor"),
]
VARIANTS: list[tuple[Kind, bool]] = [*((kind, False) for kind in KINDS if kind != "update"), ("fedpara", True)]


def layer_spec(shape: tuple[int, ...], form: Form, kind: Kind, rank: int, tanh: bool = False) -> LayerSpec:
    operator = "linear" if len(shape) == 2 else "conv2d"
    return LayerSpec(name="fc", operator=operator, kind=kind, form=form, shape=shape, rank=rank, tanh=tanh)


def gaussian(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def composed(spec: LayerSpec, *, positive: str = "", seed: int = 0) -> torch.Tensor:
    """A weight made of N(0, 1) factors; those of the branch `positive` from U(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    factors = {
        part: (torch.rand if part[1] == positive else torch.randn)(shape, generator=generator)
        for part, shape in factor_shapes(spec).items()
    }
    weight: torch.Tensor = compose(spec, factors, torch.tanh)
    return weight


@pytest.mark.parametrize(("kind", "tanh"), VARIANTS)
@pytest.mark.parametrize("rank", [1, 4, 40])
@pytest.mark.parametrize(("shape", "form"), SHAPES)
def test_the_error_is_that_of_the_factors(
    shape: tuple[int, ...], form: Form, rank: int, kind: Kind, tanh: bool
) -> None:
    spec = layer_spec(shape, form, kind, 0 if kind == "dense" else rank, tanh)
    weight = gaussian(shape)
    fit = fit_factors(spec, weight, iterations=15)
    assert {part: tuple(f.shape) for part, f in fit.factors.items()} == factor_shapes(spec)
    assert all(f.is_contiguous() and f.dtype == weight.dtype for f in fit.factors.values())
    error = (compose(spec, fit.factors, torch.tanh) - weight).norm() / weight.norm()
    assert error.item() == pytest.approx(fit.relative_error, rel=1e-3, abs=1e-5)
    assert fit.relative_error < 1


@pytest.mark.parametrize(("shape", "form"), SHAPES)
def test_lowrank_matrices_are_truncated_svds(shape: tuple[int, ...], form: Form) -> None:
    weight = gaussian(shape)
    fit = fit_factors(layer_spec(shape, form, "lowrank", 5), weight)
    singular = torch.linalg.svdvals(weight.flatten(1))
    best = (singular[5:].norm() / singular.norm()).item()
    if form == "matrix":
        assert fit.relative_error == pytest.approx(best, rel=1e-4)
    else:
        assert fit.relative_error >= best - 1e-4


@pytest.mark.parametrize("kind", ["fedpara", "pfedpara", "lowrank"])
@pytest.mark.parametrize(("shape", "form"), SHAPES)
def test_a_weight_of_low_rank_is_recovered(shape: tuple[int, ...], form: Form, kind: Kind) -> None:
    weight = composed(layer_spec(shape, form, "lowrank", 3))
    assert fit_factors(layer_spec(shape, form, kind, 3), weight).relative_error < 1e-4


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("shape", "rank"), [((30, 40), 3), ((100, 80), 5), ((64, 32, 3, 3), 8)])
def test_a_composed_weight_with_one_positive_operand_is_recovered(shape: tuple[int, ...], rank: int, seed: int) -> None:
    spec = layer_spec(shape, "matrix", "fedpara", rank)
    assert fit_factors(spec, composed(spec, positive="2", seed=seed)).relative_error < 1e-3


@pytest.mark.parametrize("kind", ["fedpara", "pfedpara"])
@pytest.mark.parametrize(("shape", "form"), SHAPES)
def test_nearer_than_lowrank_of_equal_size_on_gaussian_weights(shape: tuple[int, ...], form: Form, kind: Kind) -> None:
    spec = layer_spec(shape, form, kind, 6)
    lowrank = layer_spec(shape, form, "lowrank", equal_size_rank(shape, rank=6, form=form))
    assert factor_count(lowrank) <= factor_count(spec)
    weight = gaussian(shape)
    assert fit_factors(spec, weight).relative_error < fit_factors(lowrank, weight).relative_error


@pytest.mark.parametrize(("kind", "tanh"), [("fedpara", False), ("fedpara", True), ("pfedpara", False)])
@pytest.mark.parametrize(("shape", "form"), SHAPES)
def test_never_worse_than_the_start(shape: tuple[int, ...], form: Form, kind: Kind, tanh: bool) -> None:
    spec, weight = layer_spec(shape, form, kind, 4, tanh), gaussian(shape, seed=1)
    errors = [fit_factors(spec, weight, iterations=iterations).relative_error for iterations in (3, 100)]
    truncated = fit_factors(layer_spec(shape, form, "lowrank", 4), weight).relative_error
    rounded = 1 + torch.finfo(torch.float32).eps
    assert errors[1] <= errors[0] <= truncated * (1.001 if tanh else rounded)


@pytest.mark.parametrize("kind", ["fedpara", "pfedpara", "lowrank"])
@pytest.mark.parametrize(("shape", "form"), SHAPES)
def test_a_zero_weight_leaves_factors_that_can_learn(shape: tuple[int, ...], form: Form, kind: Kind) -> None:
    spec = layer_spec(shape, form, kind, 3)
    fit = fit_factors(spec, torch.zeros(shape))
    assert fit.relative_error == 0
    factors = {part: f.requires_grad_() for part, f in fit.factors.items()}
    weight = compose(spec, factors, torch.tanh)
    assert not weight.any()
    weight.sum().backward()
    assert any(f.grad is not None and f.grad.any() for f in factors.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    fit = fit_factors(layer_spec((30, 40), "matrix", "fedpara", 6), gaussian((30, 40)).to(dtype))
    assert {f.dtype for f in fit.factors.values()} == {dtype}


def test_same_weight_same_factors() -> None:
    spec, weight = layer_spec((30, 40), "matrix", "fedpara", 3), gaussian((30, 40))
    state = torch.get_rng_state()
    first, again = fit_factors(spec, weight), fit_factors(spec, weight)
    assert all(torch.equal(first.factors[part], again.factors[part]) for part in first.factors)
    assert torch.equal(torch.get_rng_state(), state)


def test_refusals() -> None:
    spec = layer_spec((30, 40), "matrix", "fedpara", 3)
    with pytest.raises(InputError, match=r"layer 'fc': expected a weight of shape \(30, 40\), found \(40, 30\)"):
        fit_factors(spec, gaussian((40, 30)))
    for bad, method in product((float("nan"), float("inf")), ("fedpara", "lowrank")):
        with pytest.raises(InputError, match="expected a finite weight"):
            fit_factors(layer_spec((30, 40), "matrix", method, 3), torch.full((30, 40), bad))
