"""The composed weight starts with He's variance, whatever it is composed of."""

import math
from itertools import product

import pytest
import torch
from torch import nn

from fedpara_edge.factors import compose, compose_branch, factor_shapes
from fedpara_edge.layout import KINDS, Form, Kind, LayerSpec
from fedpara_edge.nn import Linear, he_std, initialize
from fedpara_edge.nn.init import PERSONAL_STD_LIMIT, TANH_STD_LIMIT

torch.set_num_threads(1)  # the tensors are too small for threads to pay

SHAPES = [(256, 784), (10, 256), (512, 512), (64, 3, 3, 3), (128, 64, 3, 3), (256, 128, 1, 1), (32, 1, 5, 3)]
VARIANTS: list[tuple[Kind, bool]] = [*((kind, False) for kind in KINDS), ("fedpara", True)]
FORMS: list[Form] = ["matrix", "tensor"]
CASES = [
    (shape, 0 if kind == "dense" else rank, form, kind, tanh)
    for shape, rank, form, (kind, tanh) in product(SHAPES, (1, 2, 11, 52), FORMS, VARIANTS)
    if not (len(shape) == 2 and form == "tensor") and not (kind == "dense" and rank > 1)
]


def layer_spec(shape: tuple[int, ...], rank: int, form: Form, kind: Kind, tanh: bool) -> LayerSpec:
    operator = "linear" if len(shape) == 2 else "conv2d"
    return LayerSpec(name="", operator=operator, kind=kind, form=form, shape=shape, rank=rank, tanh=tanh)


def drawn(spec: LayerSpec, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    factors = {part: torch.empty(shape, dtype=dtype) for part, shape in factor_shapes(spec).items()}
    initialize(spec, factors, generator=torch.Generator().manual_seed(seed))
    return factors


def rms(tensor: torch.Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()


@pytest.mark.parametrize(("shape", "rank", "form", "kind", "tanh"), CASES)
def test_composed_weight_has_he_variance(shape: tuple[int, ...], rank: int, form: Form, kind: Kind, tanh: bool) -> None:
    spec = layer_spec(shape, rank, form, kind, tanh)
    wanted = math.sqrt(2 / math.prod(shape[1:]))
    assert he_std(spec) == wanted
    factors = drawn(spec)
    weight = compose(spec, factors, torch.tanh)
    sampling_error = 4 / math.sqrt(2 * weight.numel()) if kind == "dense" else 0
    assert rms(weight) == pytest.approx(wanted, rel=1e-4 + sampling_error)
    for branch in {part[1] for part in factors if part != "weight"}:
        sizes = [rms(factor) for part, factor in factors.items() if part.endswith(branch)]
        if min(factor.numel() for factor in factors.values()) > 50:
            assert max(sizes) < 2 * min(sizes)
    if kind == "pfedpara":
        assert rms(compose_branch(spec, factors, 2)) <= PERSONAL_STD_LIMIT * 1.001


@pytest.mark.parametrize(("kind", "tanh"), VARIANTS)
def test_mean_is_zero_over_draws(kind: Kind, tanh: bool) -> None:
    spec = layer_spec((16, 8, 3, 3), 0 if kind == "dense" else 4, "tensor", kind, tanh)
    means = [compose(spec, drawn(spec, seed=seed), torch.tanh).mean().item() for seed in range(100)]
    assert abs(sum(means) / len(means)) < 0.1 * he_std(spec)


@pytest.mark.parametrize("fan_in", [1, 2, 4, 8, 9])
@pytest.mark.parametrize("rank", [1, 3])
def test_tanh_stays_out_of_saturation_where_he_is_large(rank: int, fan_in: int) -> None:
    spec = layer_spec((32, fan_in), rank, "matrix", "fedpara", True)
    weight = compose(spec, drawn(spec), torch.tanh)
    assert rms(weight) == pytest.approx(min(math.sqrt(2 / fan_in), TANH_STD_LIMIT), rel=1e-3)


@pytest.mark.parametrize("kind", ["fedpara", "pfedpara", "lowrank", "dense"])
def test_smallest_layer(kind: Kind) -> None:
    spec = layer_spec((1, 1), 0 if kind == "dense" else 1, "matrix", kind, False)
    weight = compose(spec, drawn(spec), torch.tanh)
    assert torch.isfinite(weight).all()
    assert kind == "dense" or abs(weight.item()) == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    spec = layer_spec((64, 32, 3, 3), 8, "tensor", "fedpara", False)
    weight = compose(spec, {part: f.double() for part, f in drawn(spec, dtype=dtype).items()}, torch.tanh)
    assert rms(weight) == pytest.approx(he_std(spec), rel=0.01)


def test_seeds_decide() -> None:
    first, again, other = (torch.manual_seed(seed) and Linear(20, 10, rank=3).compose() for seed in (1, 1, 2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first, other)


def test_bias_is_zero() -> None:
    layer = Linear(20, 10, rank=3)
    assert layer.bias is not None
    assert not layer.bias.any()


@pytest.mark.parametrize(("kind", "tanh"), VARIANTS)
def test_activations_neither_vanish_nor_explode(kind: Kind, tanh: bool) -> None:
    log_energies = []
    for seed in range(8):
        torch.manual_seed(seed)
        blocks = [nn.Sequential(Linear(256, 256, kind=kind, tanh=tanh), nn.ReLU()) for _ in range(10)]
        output = nn.Sequential(*blocks)(torch.randn(32, 256))
        log_energies.append(math.log(output.square().mean().item()))
    assert abs(sum(log_energies) / len(log_energies)) < 1
