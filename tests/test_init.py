"""The composed weight starts with He's variance, whatever it is composed of; or, if asked, each of its factors."""

import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedpara_edge.demo import IMAGES
from fedpara_edge.errors import InputError
from fedpara_edge.factors.compose import compose, compose_branch, factor_shapes
from fedpara_edge.factors.factorization import Factorization, Init
from fedpara_edge.factors.layout import KINDS, Form, Kind, LayerSpec
from fedpara_edge.formats.recipe import Recipe
from fedpara_edge.nn import LSTM, Conv2d, Linear, convert, he_std, initialize, vgg16
from fedpara_edge.nn.init import PERSONAL_STD_LIMIT, TANH_STD_LIMIT

torch.set_num_threads(1)  # the tensors are too small for threads to pay

SHAPES = [(256, 784), (10, 256), (512, 512), (64, 3, 3, 3), (128, 64, 3, 3), (256, 128, 1, 1), (32, 1, 5, 3)]
HE: tuple[Init, ...] = ("he_fan_in", "he_fan_out")
VARIANTS: list[tuple[Kind, bool]] = [*((kind, False) for kind in KINDS if kind != "update"), ("fedpara", True)]
FORMS: list[Form] = ["matrix", "tensor"]
CASES = [
    (shape, 0 if kind == "dense" else rank, form, kind, tanh)
    for shape, rank, form, (kind, tanh) in product(SHAPES, (1, 2, 11, 52), FORMS, VARIANTS)
    if not (len(shape) == 2 and form == "tensor") and not (kind == "dense" and rank > 1)
]


def layer_spec(shape: tuple[int, ...], rank: int, form: Form, kind: Kind, tanh: bool) -> LayerSpec:
    operator = "linear" if len(shape) == 2 else "conv2d"
    return LayerSpec(name="", operator=operator, kind=kind, form=form, shape=shape, rank=rank, tanh=tanh)


def drawn(
    spec: LayerSpec, *, seed: int = 0, dtype: torch.dtype = torch.float32, init: Init = "composed"
) -> dict[str, torch.Tensor]:
    factors = {part: torch.empty(shape, dtype=dtype) for part, shape in factor_shapes(spec).items()}
    initialize(spec, factors, init=init, generator=torch.Generator().manual_seed(seed))
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


@pytest.mark.parametrize("init", HE)
@pytest.mark.parametrize(("shape", "rank", "form", "kind", "tanh"), CASES)
def test_each_factor_has_the_variance_of_its_own_fan(
    shape: tuple[int, ...], rank: int, form: Form, kind: Kind, tanh: bool, init: Init
) -> None:
    for part, factor in drawn(layer_spec(shape, rank, form, kind, tanh), init=init).items():
        theirs = factor.T if part[0] in "xy" else factor  # the authors' code has X and Y the other way round
        fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(theirs)
        wanted = math.sqrt(2 / (fan_in if init == "he_fan_in" else fan_out))
        assert rms(factor) == pytest.approx(wanted, rel=5 / math.sqrt(2 * factor.numel())), part
        assert abs(factor.mean().item()) < 5 * wanted / math.sqrt(factor.numel())


MEASURED: dict[tuple[tuple[int, ...], int], tuple[float, float]] = {  # of he_fan_in, and He's
    ((64, 64, 3, 3), 11): (0.0023, 0.0589),
    ((512, 512, 3, 3), 52): (1.8e-4, 0.0208),
}


@pytest.mark.parametrize(("shape", "rank"), MEASURED)
def test_what_he_by_factor_composes_to(shape: tuple[int, ...], rank: int) -> None:
    spec = layer_spec(shape, rank, "tensor", "fedpara", False)
    sizes = {init: rms(compose(spec, drawn(spec, init=init), torch.tanh)) for init in HE}
    outputs, inputs, *window = shape
    area = math.prod(window)
    assert sizes["he_fan_in"] == pytest.approx(8 * rank / (outputs * inputs * area), rel=0.15)
    assert sizes["he_fan_out"] == pytest.approx(8 / (rank * area), rel=0.15)
    found, right = MEASURED[shape, rank]
    assert he_std(spec) == pytest.approx(right, rel=0.01)
    assert sizes["he_fan_in"] == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize(("shape", "rank"), [((256, 784), 24), ((64, 32, 3, 3), 9)])
def test_what_he_by_factor_composes_to_in_matrix_form(shape: tuple[int, ...], rank: int) -> None:
    spec = layer_spec(shape, rank, "matrix", "fedpara", False)
    sizes = {init: rms(compose(spec, drawn(spec, init=init), torch.tanh)) for init in HE}
    assert sizes["he_fan_in"] == pytest.approx(4 * rank / math.prod(shape), rel=0.15)
    assert sizes["he_fan_out"] == pytest.approx(4 / rank, rel=0.15)


def test_in_vgg16_he_by_factor_is_far_too_small_or_about_right() -> None:
    ratios: dict[Init, list[float]] = {}
    for init in HE:
        torch.manual_seed(0)
        model, _ = convert(
            vgg16(kind="dense"), Factorization(gamma=0.1, init=init, include=("conv*",), rank_schedule="paper")
        )
        layers = [module for module in model.modules() if isinstance(module, Conv2d)]
        assert len(layers) == 13
        ratios[init] = [rms(layer.compose()) / he_std(layer.spec) for layer in layers]
    assert 1 / max(ratios["he_fan_in"]) > 20
    assert 1 / min(ratios["he_fan_in"]) == pytest.approx(118, rel=0.1)
    assert min(ratios["he_fan_out"]) > 0.75
    assert max(ratios["he_fan_out"]) < 2


@pytest.mark.parametrize("init", HE)
def test_convert_draws_by_factor_and_zeroes_biases(init: Init) -> None:
    dense = nn.ModuleList([nn.Linear(64, 64), nn.Conv2d(32, 32, 3), nn.LSTM(32, 64)])
    torch.manual_seed(0)
    model, report = convert(dense, Factorization(gamma=0.1, init=init))
    assert all(layer.spec is not None and layer.spec.kind == "fedpara" for layer in report.layers)
    linear, conv, lstm = model
    assert isinstance(linear, Linear)
    assert isinstance(conv, Conv2d)
    assert isinstance(lstm, LSTM)
    for layer in (linear, conv, *lstm.weights().values()):
        fans = {"x1": layer.spec.shape[0], "y1": layer.spec.shape[1]} if init == "he_fan_in" else {}
        for part in ("x1", "y1"):
            wanted = math.sqrt(2 / fans.get(part, layer.spec.rank))
            factor = layer.factors()[part]
            assert rms(factor) == pytest.approx(wanted, rel=5 / math.sqrt(2 * factor.numel()))
    assert not linear.bias.any()
    assert not conv.bias.any()
    before = linear.x1.clone()
    linear.reset_parameters()
    assert rms(linear.x1) == pytest.approx(rms(before), rel=0.3)
    assert not torch.equal(linear.x1, before)


def test_an_unknown_init_and_one_that_pretrained_weights_overrule_are_refused() -> None:
    wrong: Any = "he"
    with pytest.raises(
        InputError, match="layer 'fc': init: expected one of composed, own, he_fan_in, he_fan_out, found 'he'"
    ):
        Linear(20, 10, rank=3, init=wrong, name="fc")
    with pytest.raises(InputError, match="init: expected one of composed, own, he_fan_in, he_fan_out, found 'he'"):
        Recipe(name="mlp", init=wrong)
    with pytest.raises(InputError, match=r"init: expected composed or own with pretrained, .* found 'he_fan_in'"):
        convert(nn.Sequential(nn.Linear(20, 20)), Factorization(init="he_fan_in"), pretrained=True)
    with pytest.raises(InputError, match=r"init: expected composed or own with pretrained, .* found he_fan_in"):
        Recipe(name="mlp", init="he_fan_in", pretrained=Path("weights.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_tanh_trains_from_the_composed_initialization(form: Form) -> None:
    with np.load(IMAGES) as data:
        x = (torch.from_numpy(data["x_train"][:640]).float() / 255 - 0.286) / 0.353
        y = torch.from_numpy(data["y_train"][:640]).long()
    accuracies = {}
    for tanh in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            Conv2d(1, 8, 5, stride=3, rank=3, form=form, tanh=tanh),
            nn.ReLU(),
            Conv2d(8, 16, 3, stride=2, rank=4, form=form, tanh=tanh),
            nn.ReLU(),
            nn.Flatten(),
            Linear(144, 10, rank=4, tanh=tanh),
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for start in 5 * list(range(0, len(x), 16)):
            optimizer.zero_grad()
            F.cross_entropy(model(x[start : start + 16]), y[start : start + 16]).backward()
            optimizer.step()
        accuracies[tanh] = (model(x).argmax(1) == y).float().mean().item()
    assert accuracies[True] > max(0.65, accuracies[False] - 0.1), accuracies
