"""Conversion replaces what it should, leaves what it must, says so, and does not touch the given model."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fedpara_edge.errors import InputError
from fedpara_edge.factors.factorization import Factorization
from fedpara_edge.factors.layout import KINDS, Form, Kind
from fedpara_edge.nn import Conv2d, FactoredLayer, Linear, convert, group_count, group_norm_like
from fedpara_edge.nn.selection import find_weights

torch.set_num_threads(1)  # the tensors are too small for threads to pay


class Net(nn.Module):
    """A bit of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, groups=32, padding="same"),
            nn.Conv2d(32, 64, 3, padding="same", dilation=2, bias=False),
        )
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.blocks = nn.ModuleDict({"fc": nn.Linear(64, 64)})
        self.head = nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x).flatten(2).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        logits: torch.Tensor = self.head(self.blocks["fc"](x).mean(1))
        return logits


IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


def report_of(model: nn.Module, **options: Any) -> dict[str, str]:
    return {layer.name: layer.reason for layer in convert(model, Factorization(**options))[1].layers}


def test_what_is_converted_and_what_is_not() -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    converted, report = convert(model, Factorization(gamma=0.1))
    assert {layer.name: layer.reason for layer in report.layers} == {
        "body.0": "",
        "body.2": "depthwise: factors of its small kernels save little, and what they can't fit costs accuracy",
        "body.3": "",
        **{f"attention.{name}": "" for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
        "blocks.fc": "",
        "head": "full rank needs R = 2, whose 268 factor entries are more than the 192 of the dense weight",
    }
    assert [layer.name for layer in report.unchanged] == ["body.2", "head"]
    for layer in report.converted:
        module = converted.get_submodule(layer.name)
        assert isinstance(module, FactoredLayer)
        assert module.spec == layer.spec
        assert module.spec.name == layer.name
    assert converted(IMAGES).shape == (2, 3)
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.parameters_after == sum(p.numel() for p in converted.parameters()) < report.parameters
    assert str(report).splitlines()[-1] == f"{report.parameters:,} -> {report.parameters_after:,} parameters"

    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(isinstance(module, FactoredLayer) for module in model.modules())
    shared = {id(p) for p in model.parameters()} & {id(p) for p in converted.parameters()}
    assert not shared


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["matrix", "tensor"])
def test_every_kind_keeps_the_operator(kind: Kind, form: Form) -> None:
    """With the composed weights put back, the outputs are those of the given architecture."""
    model = Net()
    converted, report = convert(model, Factorization(kind=kind, form=form, gamma=0.1))
    for layer in report.converted:
        ours, theirs = converted.get_submodule(layer.name), find_weights(model)[layer.name]
        assert isinstance(ours, FactoredLayer)
        assert ours.spec.kind == kind
        assert theirs.value is not None
        with torch.no_grad():
            theirs.value.copy_(ours.compose())
            if isinstance(bias := getattr(theirs.layer, "bias", None), nn.Parameter):
                bias.zero_()
    torch.testing.assert_close(converted(IMAGES), model(IMAGES))


def test_kind_dense_keeps_everything() -> None:
    model = Net()
    converted, report = convert(model, Factorization(kind="dense"))
    assert not report.converted
    assert torch.equal(converted(IMAGES), model(IMAGES))


def test_a_converted_model_is_left_alone() -> None:
    once, _ = convert(Net())
    twice, report = convert(once, Factorization(kind="lowrank", gamma=0.9, exclude=("attention.*",)))
    assert {layer.reason for layer in report.layers if layer.name in ("body.0", "blocks.fc")} == {"already converted"}
    assert torch.equal(once(IMAGES), twice(IMAGES))


def test_patterns() -> None:
    model = Net()
    reasons = report_of(model, include=["body.*", "blocks.*"], exclude=["*.0"])
    assert (reasons["head"], reasons["body.0"], reasons["body.3"]) == ("not included", "excluded", "")


TRIED = ("body.0", "body.3", "blocks.fc")


def test_last_matching_override_counts_and_rank_goes_before_gamma() -> None:
    _, report = convert(
        Net(), Factorization(gamma_of={"*": 0.2, "body.*": 0.5, "blocks.fc": 0}, rank_of={"body.3": 7, "blocks.*": 5})
    )
    ranks = {layer.name: layer.spec.rank for layer in report.converted if layer.spec and layer.name in TRIED}
    _, expected = convert(Net(), Factorization(gamma_of={"*": 0.5}))
    assert ranks == {
        "body.0": next(layer.spec.rank for layer in expected.layers if layer.name == "body.0" and layer.spec),
        "body.3": 7,
        "blocks.fc": 5,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": ["haed"]}, r"exclude: 'haed' matches none of the layers body.0, body.2, .*head$"),
        ({"include": ["body"]}, r"include: 'body' matches none .*; did you mean 'body\.\*'\?"),
        ({"gamma_of": {"body.1": 0.1}}, r"gamma_of: 'body.1' matches none"),
        ({"rank_of": {"fc": 3}}, r"rank_of: 'fc' matches none"),
        ({"exclude": 3}, r"exclude: expected a list of strings, found 3"),
        ({"gamma": 2}, r"gamma: expected a number from 0 to 1, found 2"),
        ({"rank_of": {"head": 0}}, r"rank_of: expected a table with an integer of at least 1 for each key, found"),
        ({"kind": "lowrank", "tanh": True}, r"layer 'body.0': the tanh variant exists for kind 'fedpara' only"),
        ({"batchnorm": "groups"}, r"batchnorm: expected one of refuse, freeze, train, local, group, found 'groups'"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        convert(Net(), Factorization(**options))


def test_a_module_used_twice_stays_one() -> None:
    layer = nn.Linear(32, 32)
    model = nn.Sequential(layer, nn.Sequential(nn.ReLU(), layer))
    converted, report = convert(model, Factorization(gamma=0))
    assert isinstance(converted[0], Linear)
    assert converted[0] is converted[1][1]
    assert [line.name for line in report.layers] == ["0"]


def test_a_tied_weight_stays_tied() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(100, 32), "decoder": nn.Linear(32, 100)})
    model["decoder"].weight = model["embedding"].weight
    converted, report = convert(model)
    assert converted["decoder"].weight is converted["embedding"].weight
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert reasons["decoder"] == "its weight is also 'embedding.weight', and a composed weight can't be tied"
    assert report.parameters == report.parameters_after == 3300


def test_tied_biases_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].bias = model[0].bias
    converted, _ = convert(model, Factorization(gamma=0))
    assert converted[0].bias is converted[1].bias
    assert not converted[0].bias.any()


def test_layers_with_a_life_of_their_own_stay() -> None:
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(5)))
    model[0].weight.requires_grad_(False)
    model[1].register_forward_hook(lambda *_: None)
    nn.utils.parametrizations.spectral_norm(model[2])
    del model[3]._parameters["weight"]
    model[3].weight = torch.zeros(32, 32)
    assert report_of(model, gamma=0) == {
        "0": "frozen (requires_grad=False)",
        "1": "has hooks, which would be lost",
        "2": "ParametrizedLinear is a subclass, which may use its weight in its own way",
        "2.parametrizations.weight.original": "ParametrizationList has no factored form",
        "3": "its weight is computed by a hook",
        "4": "",
    }


def test_a_lone_layer() -> None:
    converted, report = convert(nn.Linear(784, 256), Factorization(gamma=0.5))
    assert isinstance(converted, Linear)
    assert [layer.name for layer in report.converted] == [""]


def test_lazy_modules_are_refused() -> None:
    with pytest.raises(InputError, match=r"parameter '0.weight': has no shape yet; run the model once"):
        convert(nn.Sequential(nn.LazyLinear(5)))


def test_mode_dtype_and_options_are_kept() -> None:
    model = (
        nn.Sequential(nn.Conv2d(32, 32, (3, 5), (1, 2), padding=(2, 0), dilation=(1, 2), bias=False)).double().eval()
    )
    layer = convert(model)[0][0]
    assert isinstance(layer, Conv2d)
    assert layer.bias is None
    assert not layer.training
    assert layer.x1.dtype == torch.float64
    x = torch.randn(1, 32, 12, 12, dtype=torch.float64)
    assert layer(x).shape == model(x).shape


def test_batchnorm_is_refused_with_a_remedy() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Sequential(nn.BatchNorm2d(64)))
    with pytest.raises(InputError, match=r"^batchnorm: module '1.0': BatchNorm2d .*; choose freeze to"):
        convert(model, Factorization(kind="dense"))


def test_batchnorm_becomes_groupnorm() -> None:
    model = nn.Sequential(nn.Conv2d(3, 96, 3), nn.BatchNorm2d(96, eps=0.01), nn.BatchNorm2d(96, affine=False))
    nn.init.normal_(model[1].weight)
    nn.init.normal_(model[1].bias)
    converted, report = convert(model, Factorization(batchnorm="group"))
    norm = converted[1]
    assert isinstance(norm, nn.GroupNorm)
    assert (norm.num_groups, norm.num_channels, norm.eps) == (32, 96, 0.01)
    assert torch.equal(norm.weight, model[1].weight)
    assert torch.equal(norm.bias, model[1].bias)
    assert converted[2].weight is None
    assert report.messages == tuple(
        f"{n}: BatchNorm2d replaced by GroupNorm with 32 groups, running statistics dropped" for n in (1, 2)
    )
    assert isinstance(model[1], nn.BatchNorm2d)
    assert converted(IMAGES).shape == (2, 96, 6, 6)


@pytest.mark.parametrize("channels", range(1, 130))
def test_group_count_is_a_divisor_that_leaves_two_channels(channels: int) -> None:
    groups = group_count(channels)
    assert channels % groups == 0
    assert groups <= 32
    assert groups == 1 or channels >= 2 * groups


@pytest.mark.parametrize("channels", [7, 32, 64])
def test_normalized_features_are_not_reduced_to_their_signs(channels: int) -> None:
    x = torch.randn(16, channels)
    normalized = group_norm_like(nn.BatchNorm1d(channels))(x)
    assert normalized.abs().std() > 0.1
    assert nn.Sequential(nn.Unflatten(1, (channels, 1, 1)), group_norm_like(nn.BatchNorm2d(channels)))(x).any()


@pytest.mark.parametrize("kind", ["fedpara", "pfedpara", "lowrank"])
def test_pretrained_weights_are_fitted(kind: Kind) -> None:
    """A model whose weights have the wanted structure keeps its outputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 64))
    with torch.no_grad():
        for layer in (model[0], model[3]):
            rows = layer.weight.shape[0]
            low = torch.randn(rows, 2) @ torch.randn(2, layer.weight[0].numel())
            layer.weight.copy_(low.reshape(layer.weight.shape) * 0.05)
            layer.bias.normal_()
    converted, report = convert(model, Factorization(kind=kind, form="matrix", gamma=0.1), pretrained=True)
    assert len(report.converted) == 2
    for line in report.converted:
        assert line.relative_error is not None
        assert line.relative_error < 1e-3
        assert "relative error 0.000" in str(line)
    x = torch.randn(4, 16, 8, 8)
    expected = model(x)
    assert (converted(x) - expected).norm() < 1e-2 * expected.norm()
    for index in (0, 3):
        assert torch.equal(converted[index].bias, model[index].bias)


def test_the_report_warns_of_a_rank_that_stays_low() -> None:
    _, report = convert(nn.Sequential(nn.Conv2d(1, 32, 3)), Factorization(gamma=0, rank_schedule="paper"))
    assert str(report.layers[0]) == "0: fedpara R=1, 288 -> 84 entries, rank of the weight at most 1 of 9"


def test_what_stays_on_the_device_counts_as_saved() -> None:
    """Half of the factors of pFedPara do not travel."""
    model = nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 100))
    reports = {kind: convert(model, Factorization(kind=kind, gamma=0.4))[1] for kind in ("fedpara", "pfedpara")}
    assert reports["fedpara"].parameters_after == reports["pfedpara"].parameters_after > 0.5 * 30_200
    assert (bool(reports["fedpara"].warning), bool(reports["pfedpara"].warning)) == (True, False)
