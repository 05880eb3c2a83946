"""The rank schedule reproduces the counts of the paper's Tables 1 and 5."""

import math
from collections.abc import Callable, Iterable
from itertools import pairwise

import pytest

from fedpara_edge.errors import InputError
from fedpara_edge.factors.choice import choose_layer
from fedpara_edge.factors.compose import attainable_rank, factor_count
from fedpara_edge.factors.layout import KINDS, Form, Kind, LayerSpec
from fedpara_edge.factors.rank import equal_size_rank, layer_spec, maximum_rank, minimum_rank, scheduled_rank

VGG16_CONVOLUTIONS = [
    (outputs, inputs, 3, 3)
    for outputs, inputs in (
        *((64, 3), (64, 64), (128, 64), (128, 128), (256, 128), (256, 256), (256, 256)),
        *((512, 256), (512, 512), (512, 512), (512, 512), (512, 512), (512, 512)),
    )
]
TABLE_5_MILLIONS = {
    10: (1.55, 2.33, 3.31, 4.45, 5.79, 7.33, 9.01, 10.90, 12.92),
    100: (1.59, 2.38, 3.36, 4.50, 5.84, 7.38, 9.05, 10.94, 12.96),
}
TABLE_5_ORIGINAL_MILLIONS = {10: 15.25, 100: 15.30}
SHAPES = [(256, 784), (10, 256), (3, 5), (64, 3, 3, 3), (512, 512, 3, 3), (32, 16, 1, 5), (128, 64, 1, 1)]


def count(kind: Kind, shape: tuple[int, ...], rank: int, form: Form = "tensor") -> int:
    return factor_count(layer_spec(shape, kind=kind, form=form, rank=rank))


def vgg16(classes: int, layers: Iterable[LayerSpec]) -> int:
    biases_and_norms = 3 * sum(shape[0] for shape in VGG16_CONVOLUTIONS)
    dense_head = 2 * (512 * 512 + 512) + 512 * classes + classes
    return sum(map(factor_count, layers)) + biases_and_norms + dense_head


def vgg16_millions(classes: int, *, kind: Kind, gamma: float = 0.1) -> float:
    layers = [choose_layer("", s, kind=kind, gamma=gamma, schedule="paper").spec for s in VGG16_CONVOLUTIONS]
    return vgg16(classes, layers) / 1e6


def test_table_1_linear() -> None:
    shape = (256, 256)
    assert minimum_rank(shape) == 16
    assert count("dense", shape, 0) == 65536
    assert count("fedpara", shape, 16) == count("lowrank", shape, 32) == 16384
    assert equal_size_rank(shape, rank=16) == 32


def test_table_1_convolution() -> None:
    shape = (256, 256, 3, 3)
    assert minimum_rank(shape) == minimum_rank(shape, form="matrix") == 16
    assert count("dense", shape, 0) == 589_824
    assert count("fedpara", shape, 16, "matrix") == 81_920
    assert count("fedpara", shape, 16, "tensor") == 20_992


def test_table_1_prints_the_count_of_fedpara_for_the_low_rank_convolution() -> None:
    shape = (256, 256, 3, 3)
    assert count("lowrank", shape, 32, "tensor") == 25_600  # printed: 21K
    assert equal_size_rank(shape, rank=16) == 27
    assert count("lowrank", shape, 27, "tensor") <= 20_992 < count("lowrank", shape, 28, "tensor")


def test_vgg16_ranks_at_a_tenth() -> None:
    ranks = [scheduled_rank(shape, gamma=0.1) for shape in VGG16_CONVOLUTIONS]
    assert ranks == [2, 11, 13, 19, 22, 30, 30, 36, 52, 52, 52, 52, 52]
    assert vgg16_millions(10, kind="fedpara") == pytest.approx(1.54662)


def with_rank(rank: Callable[[tuple[int, ...]], int]) -> int:
    shapes = VGG16_CONVOLUTIONS
    return vgg16(10, [layer_spec(shape, kind="fedpara", form="tensor", rank=rank(shape)) for shape in shapes])


def test_other_roundings_give_other_counts() -> None:
    assert with_rank(lambda shape: scheduled_rank(shape, gamma=0)) == 925_720
    assert with_rank(lambda shape: math.ceil(math.sqrt(max(shape[:2])))) == 951_334  # the authors' notebook
    assert with_rank(lambda shape: scheduled_rank(shape, gamma=0.1)) == 1_546_620
    found = with_rank(lambda shape: -(-(9 * minimum_rank(shape) + maximum_rank(shape)) // 10))
    assert found == 1_546_844  # Flower's baseline


@pytest.mark.parametrize("classes", [10, 100])
def test_table_5(classes: int) -> None:
    found = [vgg16_millions(classes, kind="fedpara", gamma=tenths / 10) for tenths in range(1, 10)]
    assert found == pytest.approx(TABLE_5_MILLIONS[classes], abs=0.02)
    assert vgg16_millions(classes, kind="dense") == pytest.approx(TABLE_5_ORIGINAL_MILLIONS[classes], abs=0.01)


def test_pfedpara_sends_a_third_of_the_papers_mlp() -> None:
    layers = [choose_layer("", shape, kind="pfedpara", gamma=0.5).spec for shape in ((256, 784), (62, 256))]
    biases = 256 + 62
    dense = sum(layer.dense_parameters for layer in layers) + biases
    assert round(dense / (sum(map(factor_count, layers)) / 2 + biases), 1) == 3.4


@pytest.mark.parametrize("form", ["matrix", "tensor"])
@pytest.mark.parametrize("shape", SHAPES)
def test_bounds_are_tight(shape: tuple[int, ...], form: Form) -> None:
    low, high = minimum_rank(shape, form=form), maximum_rank(shape, form=form)
    rows, columns = shape[0], math.prod(shape[1:]) if form == "matrix" else shape[1]
    assert (low - 1) ** 2 < min(rows, columns) <= low**2
    assert high == 0 or count("fedpara", shape, high, form) <= math.prod(shape)
    assert count("fedpara", shape, high + 1, form) > math.prod(shape)
    if form == "matrix":
        spec = LayerSpec(name="", operator="conv2d", kind="fedpara", form="matrix", shape=(*shape, 1, 1)[:4], rank=low)
        assert attainable_rank(spec) == min(spec.matrix_shape)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if maximum_rank(shape) >= minimum_rank(shape)])
def test_rank_grows_with_gamma_between_its_bounds(shape: tuple[int, ...]) -> None:
    ranks = [scheduled_rank(shape, gamma=percent / 100) for percent in range(101)]
    assert ranks[0] == minimum_rank(shape)
    assert ranks[-1] == maximum_rank(shape)
    assert all(a <= b for a, b in pairwise(ranks))


def test_half_is_rounded_up() -> None:
    assert (minimum_rank((4, 100)), maximum_rank((22, 16)), minimum_rank((22, 16))) == (2, 4, 4)
    shape = (30, 30)
    assert (minimum_rank(shape), maximum_rank(shape)) == (6, 7)
    assert [scheduled_rank(shape, gamma=gamma) for gamma in (0.49, 0.5, 0.51)] == [6, 7, 7]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["matrix", "tensor"])
@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_chosen_layer_is_smaller_than_dense_or_says_why_not(
    shape: tuple[int, ...], gamma: float, form: Form, kind: Kind
) -> None:
    spec, reason, _ = choose_layer("body.layer", shape, kind=kind, form=form, gamma=gamma)
    assert (spec.name, spec.shape) == ("body.layer", shape)
    if spec.kind == "dense":
        assert bool(reason) == (kind != "dense")
    else:
        assert (spec.kind, reason) == (kind, "")
        assert factor_count(spec) < spec.dense_parameters
        fedpara = choose_layer("", shape, kind="fedpara", form=form, gamma=gamma).spec
        if kind in ("lowrank", "update"):
            larger = count(kind, shape, spec.rank + 1, form)
            assert factor_count(spec) <= factor_count(fedpara) < larger
        else:
            assert spec.rank == fedpara.rank


def test_an_explicit_rank_is_taken_unless_it_does_not_shrink() -> None:
    assert choose_layer("fc", (256, 784), rank=5, gamma=0.9).spec.rank == 5
    spec, reason, _ = choose_layer("fc", (256, 784), rank=500)
    assert (spec.kind, spec.rank) == ("dense", 0)
    assert "1040000" in reason
    assert "200704" in reason


def test_tanh_survives_only_where_there_are_factors() -> None:
    assert choose_layer("fc", (256, 784), tanh=True).spec.tanh
    assert not choose_layer("fc", (2, 3), tanh=True).spec.tanh


@pytest.mark.parametrize("gamma", [-0.1, 1.1, math.nan])
def test_gamma_out_of_range(gamma: float) -> None:
    with pytest.raises(InputError, match="gamma: expected a number from 0 to 1"):
        choose_layer("fc", (256, 784), gamma=gamma)


@pytest.mark.parametrize("rank", [0, -1])
def test_rank_out_of_range(rank: int) -> None:
    with pytest.raises(InputError, match=r"layer 'fc': expected a rank of at least 1"):
        choose_layer("fc", (256, 784), rank=rank)


@pytest.mark.parametrize("shape", [(0, 3), (3,), (4, 4, 3)])
def test_impossible_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="positive dimensions"):
        choose_layer("fc", shape)
