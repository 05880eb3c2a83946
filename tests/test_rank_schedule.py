"""The rank schedule `full`: full rank or dense, least savings left dense, the same layers in every kind."""

import math

import pytest
import torch
from torch import nn

from fedpara_edge.errors import InputError
from fedpara_edge.factors.choice import SMALL_SHARE, choose_layer, least_savings
from fedpara_edge.factors.compose import attainable_rank, compose, factor_count, factor_shapes
from fedpara_edge.factors.factorization import Factorization
from fedpara_edge.factors.layout import KINDS, Form, LayerSpec
from fedpara_edge.nn import ZOO, ConversionReport, convert, load_model

SHAPES = [
    *((32, 1, k, k) for k in (3, 5, 7)),
    *((64, 3, k, k) for k in (3, 4, 7, 16)),
    (192, 3, 16, 16),
    (128, 64, 3, 3),
    (64, 128, 3, 3),
    (128, 64, 1, 1),
    (64, 32, 9, 1),
    (16, 1, 3, 3),
    (256, 784),
    (2, 16),
]


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("form", ["matrix", "tensor"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_attains_full_rank_or_is_dense(shape: tuple[int, ...], form: Form, gamma: float) -> None:
    spec, reason, note = choose_layer("layer", shape, form=form, gamma=gamma)
    assert attainable_rank(spec) == min(spec.matrix_shape)
    if spec.kind == "dense":
        assert "dense weight" in reason
        forms: tuple[Form, ...] = ("matrix",) if form == "matrix" or len(shape) == 2 else ("matrix", "tensor")
        rank = math.isqrt(min(spec.matrix_shape) - 1) + 1
        # No form of full rank is smaller at the smallest γ, at which this one would be tried in vain.
        assert gamma > 0 or all(_count(shape, form, rank) >= math.prod(shape) for form in forms)
    else:
        assert factor_count(spec) < spec.dense_parameters
        paper = choose_layer("layer", shape, form=form, gamma=gamma, schedule="paper").spec
        assert bool(note) == (spec != paper)


@pytest.mark.parametrize("shape", [(32, 1, 5, 5), (64, 3, 7, 7), (128, 64, 3, 3), (40, 36, 1, 1)])
def test_full_rank_is_attained(shape: tuple[int, ...]) -> None:
    """Random factors compose to a weight of full rank."""
    spec = choose_layer("layer", shape, gamma=0).spec
    assert spec.kind == "fedpara"
    generator = torch.Generator().manual_seed(0)
    factors = {
        part: torch.randn(size, generator=generator, dtype=torch.float64) for part, size in factor_shapes(spec).items()
    }
    weight = compose(spec, factors, torch.tanh).reshape(spec.matrix_shape)
    assert int(torch.linalg.matrix_rank(weight)) == min(spec.matrix_shape)


def test_the_paper_gives_a_first_convolution_rank_one() -> None:
    shape = (32, 1, 5, 5)
    paper, full = (choose_layer("stem", shape, gamma=0, schedule=schedule).spec for schedule in ("paper", "full"))
    assert (paper.form, paper.rank, attainable_rank(paper)) == ("tensor", 1, 1)
    assert (full.form, full.rank, attainable_rank(full)) == ("matrix", 5, 25)


def test_the_smaller_of_both_forms_is_taken() -> None:
    raised = choose_layer("layer", (128, 64, 3, 3), gamma=0)
    assert (raised.spec.form, raised.spec.rank, raised.note) == ("tensor", 12, "as R = 8 attains rank 64 of 128")
    assert factor_count(raised.spec) < _count((128, 64, 3, 3), "matrix", 12)


def test_a_given_rank_is_taken_as_it_is() -> None:
    assert choose_layer("stem", (32, 3, 3, 3), rank=2).spec.rank == 2
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Linear(512, 512))
    _, report = convert(model, Factorization(rank_of={"0": 2}))
    assert _rank(report, "0") == 2
    assert str(report.layers[0]).endswith("rank of the weight at most 4 of 27")


def test_layers_that_save_least_stay_dense() -> None:
    model = nn.Sequential(nn.Conv2d(1, 32, 3), nn.Conv2d(32, 256, 3), nn.Conv2d(256, 256, 3), nn.Linear(256, 10))
    _, report = convert(model)
    assert report.layers[0].reason == "factors of full rank would save 42 of the model's 666,954 parameters"
    assert report.layers[3].reason.startswith("factors of full rank would save 432 of")
    assert (_rank(report, "0"), _rank(report, "3")) == (0, 0)
    assert all(_rank(report, name) > 0 for name in ("1", "2"))
    assert SMALL_SHARE * report.parameters >= 42 + 432
    _, given = convert(model, Factorization(gamma_of={"0": 0.1}))
    assert _rank(given, "0") == 3
    _, paper = convert(model, Factorization(rank_schedule="paper"))
    assert (_rank(paper, "0"), _rank(paper, "3")) == (1, 4)


def test_only_so_many_are_left_that_nothing_is_lost() -> None:
    savings = {f"layer{n}": 100 for n in range(30)}
    assert len(least_savings(savings, 1_000_000)) == 10
    assert not least_savings({"layer": 1001}, 1_000_000)


@pytest.mark.parametrize("name", ["vgg16", "resnet18"])
def test_every_kind_leaves_the_same_layers_dense(name: str) -> None:
    left = []
    for kind in KINDS[:3]:
        _, report = convert(load_model(name), Factorization(kind=kind, exclude=ZOO[name].dense_layers))
        left.append({layer.name for layer in report.unchanged})
    assert left[0] == left[1] == left[2]


@pytest.mark.parametrize("name", ZOO)
def test_what_the_zoo_changes_by_the_schedule(name: str) -> None:
    """At γ = 0.1, only first convolutions and 1x1 shortcuts."""
    specs = []
    for schedule in ("paper", "full"):
        entry = ZOO[name]
        options = Factorization(exclude=entry.dense_layers, rank_schedule=schedule, batchnorm=entry.batchnorm)
        specs.append({layer.name: layer.spec for layer in convert(load_model(name), options)[1].layers})
    expected = {
        "vgg16": {"conv1_1"},
        "resnet18": {"conv0", *(f"block{n}_1.shortcut.0" for n in (2, 3, 4))},
    }
    changed = {layer for layer, spec in specs[0].items() if spec != specs[1][layer]}
    if name.startswith("mobilenet"):  # pointwise convolutions take matrix form
        assert {specs[0][layer].shape[2:] for layer in changed} == {(1, 1)}
    else:
        assert changed == expected.get(name, set())


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(InputError, match="rank_schedule: expected one of full, paper, found 'half'"):
        Factorization(rank_schedule="half")  # type: ignore[arg-type]


def _count(shape: tuple[int, ...], form: Form, rank: int) -> int:
    operator, form = ("linear", "matrix") if len(shape) == 2 else ("conv2d", form)
    return factor_count(LayerSpec(name="", operator=operator, kind="fedpara", form=form, shape=shape, rank=rank))  # type: ignore[arg-type]


def _rank(report: ConversionReport, name: str) -> int:
    (spec,) = (layer.spec for layer in report.layers if layer.name == name)
    assert spec is not None
    return spec.rank
