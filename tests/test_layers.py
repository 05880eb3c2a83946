"""Layers compose the weight of the formulas, apply torch's operator to it, and have the right gradients."""

import copy
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedpara_edge.errors import InputError
from fedpara_edge.factors.compose import attainable_rank, factor_shapes
from fedpara_edge.factors.layout import KINDS, Form, Kind
from fedpara_edge.nn import Conv2d, FactoredLayer, Linear

torch.set_num_threads(1)  # the tensors are too small for threads to pay

SHAPES = [(6, 5), (4, 9), (1, 3), (6, 5, 3, 3), (3, 4, 1, 1), (5, 2, 2, 4), (1, 1, 3, 1)]
VARIANTS: list[tuple[Kind, bool]] = [*((kind, False) for kind in KINDS if kind != "update"), ("fedpara", True)]
FORMS: list[Form] = ["matrix", "tensor"]
CASES = [
    (shape, rank, form, kind, tanh)
    for shape, rank, form, (kind, tanh) in product(SHAPES, (1, 2, 7), FORMS, VARIANTS)
    if not (len(shape) == 2 and form == "tensor")
]


def make(
    shape: tuple[int, ...], rank: int, form: Form, kind: Kind, tanh: bool, dtype: torch.dtype = torch.float64
) -> FactoredLayer:
    rank = 0 if kind == "dense" else rank
    if len(shape) == 2:
        return Linear(shape[1], shape[0], dtype=dtype, kind=kind, rank=rank, tanh=tanh)
    kernel = (shape[2], shape[3])
    return Conv2d(shape[1], shape[0], kernel, dtype=dtype, kind=kind, rank=rank, form=form, tanh=tanh)


def reference_weight(layer: FactoredLayer) -> np.ndarray:
    """The weight by the formulas of the paper, term by term."""
    spec, f = layer.spec, {part: factor.detach().numpy() for part, factor in layer.factors().items()}
    if spec.kind == "dense":
        return f["weight"]
    if spec.form == "matrix":
        branches = [np.einsum("or,nr->on", f[f"x{i}"], f[f"y{i}"]).reshape(spec.shape) for i in (1, 2) if f"x{i}" in f]
    else:
        branches = [np.einsum("rskl,or,is->oikl", f[f"t{i}"], f[f"x{i}"], f[f"y{i}"]) for i in (1, 2) if f"x{i}" in f]
    if spec.kind == "lowrank":
        return branches[0]
    if spec.kind == "pfedpara":
        return branches[0] * (branches[1] + 1)
    return np.tanh(branches[0]) * np.tanh(branches[1]) if spec.tanh else branches[0] * branches[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "rank", "form", "kind", "tanh"), CASES)
def test_composed_is_the_formula(
    shape: tuple[int, ...], rank: int, form: Form, kind: Kind, tanh: bool, dtype: torch.dtype
) -> None:
    layer = make(shape, rank, form, kind, tanh, dtype)
    weight = layer.compose()
    assert weight.dtype == dtype
    assert tuple(weight.shape) == shape
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    np.testing.assert_allclose(weight.detach().numpy(), reference_weight(layer), rtol=tolerance, atol=tolerance)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {**factor_shapes(layer.spec), "bias": (shape[0],)}


@pytest.mark.parametrize(("shape", "rank", "form", "kind", "tanh"), [case for case in CASES if case[1] == 2])
def test_gradients(shape: tuple[int, ...], rank: int, form: Form, kind: Kind, tanh: bool) -> None:
    layer = make(shape, rank, form, kind, tanh)
    x = torch.randn(2, shape[1], *((5, 5) if len(shape) == 4 else ()), dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def apply(x: torch.Tensor, *parameters: torch.Tensor) -> Any:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(apply, (x, *layer.parameters()))


CONVOLUTION_OPTIONS: list[dict[str, Any]] = [
    {},
    {"stride": 2},
    {"stride": (1, 3), "padding": (2, 0)},
    {"padding": 1, "dilation": 2},
    {"padding": "same"},
    {"padding": "same", "dilation": (2, 1)},
    {"padding": "valid", "stride": 2, "dilation": (1, 2)},
    {"bias": False},
]


@pytest.mark.parametrize("kernel", [1, 3, (2, 4)])
@pytest.mark.parametrize("options", CONVOLUTION_OPTIONS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_convolution_is_torchs_with_the_composed_weight(options: dict[str, Any], kernel: Any) -> None:
    theirs = nn.Conv2d(3, 4, kernel, **options)
    ours = Conv2d(3, 4, kernel, **options, rank=2)
    x = torch.randn(2, 3, 9, 11)
    with torch.no_grad():
        theirs.weight.copy_(ours.compose())
        if theirs.bias is not None:
            theirs.bias.normal_()
            assert ours.bias is not None
            ours.bias.copy_(theirs.bias)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x[0]), theirs(x[0]))
    for attribute in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)


@pytest.mark.parametrize(("kind", "tanh"), VARIANTS)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_torchs_with_the_composed_weight(kind: Kind, tanh: bool, bias: bool) -> None:
    layer = Linear(7, 5, bias, kind=kind, tanh=tanh)
    assert (layer.bias is not None) == bias
    for x in (torch.randn(7), torch.randn(3, 7), torch.randn(2, 4, 7)):
        torch.testing.assert_close(layer(x), F.linear(x, layer.compose(), layer.bias))


def test_full_rank_is_attained() -> None:
    """Figure 6: 100 x 100 with R = 10 and N(0, 1) factors has full rank, every time."""
    layer = Linear(100, 100, rank=10, dtype=torch.float64)
    for _ in range(50):
        for factor in layer.factors().values():
            nn.init.normal_(factor)
        assert torch.linalg.matrix_rank(layer.compose()).item() == 100


@pytest.mark.parametrize("kind", ["fedpara", "lowrank"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_rank_is_bounded(rank: int, form: Form, kind: Kind) -> None:
    layer = make((20, 15, 3, 3), rank, form, kind, tanh=False)
    weight = layer.compose().reshape(layer.spec.matrix_shape)
    assert torch.linalg.matrix_rank(weight).item() == attainable_rank(layer.spec)


@pytest.mark.parametrize(("kind", "rank"), [("fedpara", 8), ("pfedpara", 8), ("lowrank", 16), ("dense", 0)])
def test_default_rank_is_the_smallest_useful_one(kind: Kind, rank: int) -> None:
    assert Linear(784, 64, kind=kind).spec.rank == rank


def test_weight_is_readable_but_not_a_parameter() -> None:
    layer = Linear(6, 4, rank=2)
    torch.testing.assert_close(layer.weight, layer.compose())
    assert "weight" not in layer.state_dict()
    with pytest.raises(KeyError):
        layer.weight = nn.Parameter(torch.zeros(4, 6))
    with pytest.raises(AttributeError):
        _ = layer.missing
    transformer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    transformer.linear1 = Linear(8, 16, rank=3)
    with torch.no_grad():  # the fast path of torch reads linear1.weight
        assert transformer(torch.ones(1, 3, 8)).shape == (1, 3, 8)


def test_exports_as_a_graph_of_its_factors() -> None:
    model = nn.Sequential(Conv2d(3, 4, 3, rank=2, tanh=True), nn.Flatten(), Linear(36, 5, rank=2, kind="pfedpara"))
    x = torch.randn(2, 3, 5, 5)
    exported = torch.export.export(model, (x,))
    assert set(exported.graph_signature.parameters) == {name for name, _ in model.named_parameters()}
    torch.testing.assert_close(exported.module()(x), model(x))


def test_copies_and_moves_like_any_module() -> None:
    layer = Conv2d(3, 4, 3, rank=2, name="stem")
    twin = copy.deepcopy(layer).double()
    assert twin.spec == layer.spec
    torch.testing.assert_close(twin.compose().float(), layer.compose())
    other = Conv2d(3, 4, 3, rank=2)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other.compose(), layer.compose())
    assert Linear(6, 4, device="meta").compose().shape == (4, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 2}, r"layer 'stem': expected groups=1, found 2; keep this layer dense \(exclude it\)"),
        ({"padding_mode": "reflect"}, r"expected padding_mode='zeros', found 'reflect'; keep this layer dense"),
        ({"padding": "full"}, r"expected a padding of numbers, 'same' or 'valid', found 'full'"),
        ({"padding": "same", "stride": 2}, r"padding='same' needs stride 1, found 2; give the padding in numbers"),
        ({"rank": 0}, r"rank is 0 for a dense layer and positive for the others, found 0"),
        ({"kind": "dense", "rank": 3}, r"rank is 0 for a dense layer"),
        ({"kind": "lowrank", "tanh": True}, r"the tanh variant exists for kind 'fedpara' only, found lowrank"),
        ({"kind": "tucker", "rank": 2}, r"unknown kind 'tucker', expected one of fedpara, pfedpara, lowrank, dense"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Conv2d(4, 4, 3, name="stem", **options)
