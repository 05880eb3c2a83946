"""The layout of a model agrees with its `state_dict`, and says of each tensor what it is and whether it travels."""

import pytest
import torch
from torch import nn

from fedpara_edge.errors import InputError
from fedpara_edge.factors.compose import compose, factor_shapes
from fedpara_edge.factors.factorization import Factorization
from fedpara_edge.factors.layout import KINDS, Kind, Layout
from fedpara_edge.nn import ZOO, Conv2d, FactoredLayer, Linear, convert, layout_of

torch.set_num_threads(1)  # the tensors are too small for threads to pay


DENSE_PARAMETERS = {
    "mlp": 203_530,
    "cnn": 391_370,
    "vgg16": 15_253_578,
    "resnet18": 11_173_962,
    "char-lstm": 819_920,
    "har-transformer": 271_621,
    "mobilenetv2": 2_236_682,
    "mobilenetv2-0.25": 250_922,
    "mobilenetv3-small": 1_528_106,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ZOO)
def test_layout_is_the_state_dict(name: str, kind: Kind) -> None:
    model = ZOO[name].factory(kind=kind)
    layout = layout_of(model)
    expected = [(key, tuple(t.shape), str(t.numpy().dtype)) for key, t in model.state_dict().items()]
    assert [(t.name, t.shape, t.dtype) for t in layout.tensors] == expected
    assert Layout.from_json(layout.to_json()) == layout

    for layer in layout.layers:
        parts = layout.parts(layer)
        assert {part: parts[part].shape for part in factor_shapes(layer)} == factor_shapes(layer)
        module = model.get_submodule(layer.name)
        if isinstance(module, FactoredLayer):
            assert module.spec == layer
        arrays = {part: model.state_dict()[tensor.name] for part, tensor in parts.items()}
        torch.testing.assert_close(compose(layer, arrays, torch.tanh), module.weight.detach())

    travelling, staying = (sum(tensor.size for tensor in layout.with_role(role)) for role in ("shared", "personal"))
    statistics = sum(tensor.size for tensor in layout.statistics)
    assert travelling + staying - statistics == sum(p.numel() for p in model.parameters())
    assert (staying > 0) == (kind == "pfedpara")
    assert {tensor.part for tensor in layout.with_role("personal")} <= {"x2", "y2", "t2"}
    assert layout.dense_parameters - statistics == DENSE_PARAMETERS[name]


class Mixed(nn.Module):
    """Things that are no plain layers."""

    offset: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.x1 = nn.Parameter(torch.ones(2))
        self.register_buffer("offset", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.body = nn.Sequential(
            Conv2d(4, 8, 3, kind="pfedpara", rank=2),
            nn.GroupNorm(2, 8),
            nn.Conv2d(8, 8, 3, groups=4),
            nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        )
        self.frozen = nn.Linear(8, 4, bias=False).requires_grad_(False)
        self.memory = nn.LSTM(4, 5)
        self.head = nn.Linear(5, 3)


def test_parts_and_roles() -> None:
    model = Mixed()
    layout = layout_of(model)
    assert [t.name for t in layout.tensors] == list(model.state_dict())
    found = {t.name: (t.layer, t.part, t.role) for t in layout.tensors}
    assert found == {
        "scale": ("", "other", "shared"),
        "x1": ("", "other", "shared"),
        "offset": ("", "other", "frozen"),
        "body.0.t1": ("body.0", "t1", "shared"),
        "body.0.x1": ("body.0", "x1", "shared"),
        "body.0.y1": ("body.0", "y1", "shared"),
        "body.0.t2": ("body.0", "t2", "personal"),
        "body.0.x2": ("body.0", "x2", "personal"),
        "body.0.y2": ("body.0", "y2", "personal"),
        "body.0.bias": ("body.0", "bias", "shared"),
        "body.1.weight": ("body.1", "norm", "shared"),
        "body.1.bias": ("body.1", "norm", "shared"),
        "body.2.weight": ("body.2", "weight", "shared"),
        "body.2.bias": ("body.2", "bias", "shared"),
        "body.3.weight": ("body.3", "norm", "shared"),
        "body.3.bias": ("body.3", "norm", "shared"),
        "body.3.running_mean": ("body.3", "other", "frozen"),
        "body.3.running_var": ("body.3", "other", "frozen"),
        "body.3.num_batches_tracked": ("body.3", "other", "frozen"),
        "frozen.weight": ("frozen", "weight", "frozen"),
        "memory.weight_ih_l0": ("memory", "other", "shared"),
        "memory.weight_hh_l0": ("memory", "other", "shared"),
        "memory.bias_ih_l0": ("memory", "other", "shared"),
        "memory.bias_hh_l0": ("memory", "other", "shared"),
        "head.weight": ("head", "weight", "shared"),
        "head.bias": ("head", "bias", "shared"),
    }
    assert [(layer.name, layer.kind) for layer in layout.layers] == [
        ("body.0", "pfedpara"),
        ("frozen", "dense"),
        ("head", "dense"),
    ]


def test_a_layer_is_named_by_its_place() -> None:
    layer = Linear(6, 4, rank=2, name="elsewhere")
    assert layout_of(nn.Sequential(layer)).layers[0].name == "0"
    assert layout_of(layer).layers[0].name == ""


def test_what_is_shared_inside_the_model_is_listed_once() -> None:
    tied = nn.ModuleDict({"embedding": nn.Embedding(10, 4), "decoder": nn.Linear(4, 10)})
    tied["decoder"].weight = tied["embedding"].weight
    layout = layout_of(tied)
    assert [t.name for t in layout.tensors] == ["embedding.weight", "decoder.bias"]
    assert layout.layers == ()
    assert layout.dense_parameters == layout.shared_parameters == 50

    layer = nn.Linear(32, 32)
    repeated = layout_of(convert(nn.Sequential(layer, layer), Factorization(gamma=0))[0])
    assert [t.name for t in repeated.tensors] == ["0.x1", "0.y1", "0.x2", "0.y2", "0.bias"]
    assert len(repeated.layers) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_trainable_tensors_are_float32(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=r"tensor '0.x1': trainable tensors are float32, found .*float\(\)"):
        layout_of(nn.Sequential(Linear(6, 4, rank=2, dtype=dtype)))


def test_frozen_tensors_have_a_numpy_dtype() -> None:
    model = nn.Linear(4, 4, dtype=torch.bfloat16).requires_grad_(False)
    with pytest.raises(InputError, match=r"tensor 'weight': expected a dtype of .*, found bfloat16"):
        layout_of(model)
    assert layout_of(model.half()).tensors[0].dtype == "float16"
