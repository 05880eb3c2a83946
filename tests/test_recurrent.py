"""LSTM and GRU made of factors compute, start and convert as torch's do with the composed weights."""

import copy
import math
from typing import Any

import pytest
import torch
from recurrent_models import PAIRS, Tagger
from torch import nn

from fedpara_edge.aggregation.weightsample import sample_layer
from fedpara_edge.errors import InputError
from fedpara_edge.factors.choice import choose_layer
from fedpara_edge.factors.factorization import Factorization
from fedpara_edge.factors.layout import KINDS, Kind, Layout
from fedpara_edge.nn import GRU, LSTM, convert, layout_of
from fedpara_edge.nn.recurrent import FactoredRecurrent

torch.set_num_threads(1)  # the tensors are too small for threads to pay

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first, two layers": {"num_layers": 2, "batch_first": True},
    "no bias": {"bias": False, "num_layers": 2},
    "both directions": {"bidirectional": True, "num_layers": 2},
}
VARIANTS: list[tuple[Kind, bool]] = [*((kind, False) for kind in KINDS if kind != "update"), ("fedpara", True)]
every_pair = pytest.mark.parametrize("pair", PAIRS)


def rms(tensor: torch.Tensor) -> float:
    return tensor.detach().double().square().mean().sqrt().item()


def as_torchs(layer: FactoredRecurrent, torchs: type[nn.Module], *sizes: int, **options: Any) -> nn.Module:
    """torch's layer with the composed weights and the same biases."""
    plain = torchs(*sizes, dtype=torch.float64, **options)
    tensors = {name: weight().detach() for name, weight in layer.weights().items()}
    tensors |= dict(layer.named_parameters(recurse=False))
    plain.load_state_dict(tensors)
    return plain


def flat(result: Any) -> list[torch.Tensor]:
    """Outputs and last states."""
    outputs, state = result
    return [outputs, *state] if isinstance(state, tuple) else [outputs, state]


@pytest.mark.parametrize(("kind", "tanh"), VARIANTS)
@pytest.mark.parametrize("options", OPTIONS)
@every_pair
def test_values_and_gradients_are_torchs(pair: str, options: str, kind: Kind, tanh: bool) -> None:
    ours, torchs = PAIRS[pair]
    given = OPTIONS[options]
    torch.manual_seed(0)
    layer = ours(5, 6, dtype=torch.float64, kind=kind, rank=0 if kind == "dense" else 2, tanh=tanh, **given)
    plain = as_torchs(layer, torchs, 5, 6, **given)
    assert [name for name, _ in plain.named_parameters()] != [name for name, _ in layer.named_parameters()]
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    found, expected = (torch.cat([part.flatten() for part in flat(module(x))]) for module in (layer, plain))
    torch.testing.assert_close(found, expected)
    directions = torch.randn_like(expected)
    of_input, of_torchs_input = (torch.autograd.grad(y, x, directions, retain_graph=True)[0] for y in (found, expected))
    torch.testing.assert_close(of_input, of_torchs_input)
    (found @ directions).backward()
    (expected @ directions).backward()
    for name, weight in layer.weights().items():
        factors = list(weight.factors().values())
        through = torch.autograd.grad(weight(), factors, plain.get_parameter(name).grad)
        for factor, gradient in zip(factors, through, strict=True):
            torch.testing.assert_close(factor.grad, gradient)
    for name, bias in layer.named_parameters(recurse=False):
        torch.testing.assert_close(bias.grad, plain.get_parameter(name).grad)


@pytest.mark.parametrize("batch_first", [False, True])
@every_pair
def test_one_sequence_and_given_states(pair: str, batch_first: bool) -> None:
    ours, torchs = PAIRS[pair]
    options = {"num_layers": 2, "batch_first": batch_first}
    torch.manual_seed(0)
    layer = ours(5, 6, dtype=torch.float64, rank=2, **options)
    plain = as_torchs(layer, torchs, 5, 6, **options)
    for x, batch in ((torch.randn(4, 3, 5), [3 if not batch_first else 4]), (torch.randn(7, 5), [])):
        states = tuple(torch.randn(2, *batch, 6, dtype=torch.float64) for _ in range(2))
        given = states if pair == "lstm" else states[0]
        for hx in (None, given):
            for found, expected in zip(flat(layer(x.double(), hx)), flat(plain(x.double(), hx)), strict=True):
                assert found.shape == expected.shape
                torch.testing.assert_close(found, expected)


@every_pair
def test_dropout_is_torchs(pair: str) -> None:
    ours, torchs = PAIRS[pair]
    layer = ours(5, 6, 2, dropout=0.5, dtype=torch.float64, rank=2)
    plain = as_torchs(layer, torchs, 5, 6, num_layers=2, dropout=0.5)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    outputs = []
    for training in (True, False):
        for module in (layer, plain):
            torch.manual_seed(1)
            outputs.append(module.train(training)(x)[0])
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[2], outputs[3])
    assert not torch.allclose(outputs[0], outputs[2])


@pytest.mark.parametrize(("kind", "tanh"), VARIANTS)
@every_pair
def test_composed_weights_start_with_torchs_variance(pair: str, kind: Kind, tanh: bool) -> None:
    """Of U(-1/√H, 1/√H), 1 / (3 H), for input and recurrent weights alike; biases are drawn as torch draws them."""
    ours, torchs = PAIRS[pair]
    torch.manual_seed(0)
    layer, plain = ours(40, 64, 2, kind=kind, tanh=tanh), torchs(40, 64, 2)
    wanted = 1 / math.sqrt(3 * 64)
    assert rms(plain.get_parameter("weight_ih_l0")) == pytest.approx(wanted, rel=0.02)
    before = copy.deepcopy(layer)
    layer.reset_parameters()
    for module in (before, layer):
        for name, weight in module.weights().items():
            error = 0.03 if kind == "dense" else 1e-4
            assert rms(weight()) == pytest.approx(wanted, rel=error), name
        for _, bias in module.named_parameters(recurse=False):
            assert bias.abs().max() <= 1 / 8
            assert rms(bias) == pytest.approx(wanted, rel=0.15)
    for one, other in zip(before.parameters(), layer.parameters(), strict=True):
        assert not torch.equal(one, other)


@every_pair
def test_ranks_follow_the_schedule(pair: str) -> None:
    ours, _ = PAIRS[pair]
    layer = ours(3, 64, 2, kind="lowrank", gamma=0.3, name="body.memory")
    rows = layer.gates * 64
    for name, weight in layer.weights().items():
        shape = (rows, 3) if name == "weight_ih_l0" else (rows, 64)
        assert weight.spec == choose_layer(f"body.memory.{name}", shape, kind="lowrank", gamma=0.3).spec
    assert layer.weights()["weight_ih_l0"].spec.kind == "dense"
    names = list(layer.weights())
    chosen = ours(3, 64, 2, rank=dict(zip(names, (0, 5, 6, 7), strict=True))).weights()
    assert [weight.spec.rank for weight in chosen.values()] == [0, 5, 6, 7]
    assert [weight.spec.kind for weight in chosen.values()] == ["dense", "fedpara", "fedpara", "fedpara"]
    assert {weight.spec.rank for weight in ours(3, 64, rank=9).weights().values()} == {9}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LSTM(3, 4, proj_size=2, name="memory"), r"layer 'memory': expected proj_size=0, found 2; keep"),
        (lambda: LSTM(0, 4), r"LSTM: expected sizes and layers of at least 1 .*, found input size 0, hidden size 4"),
        (lambda: GRU(3, 4, dropout=1.5), r"GRU: expected .* a dropout from 0 to 1, found .* dropout 1.5"),
        (lambda: GRU(3, 4, rank={"weight_ih_l0": 2}), r"GRU: expected a rank for each of weight_ih_l0, weight_hh_l0"),
        (lambda: GRU(3, 4, rank=-1), r"layer 'weight_ih_l0': rank is 0 for a dense layer and positive"),
        (lambda: GRU(3, 4, kind="lowrank", rank=1, tanh=True), r"layer 'weight_ih_l0': the tanh variant exists"),
    ],
)
def test_refusals(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_packed_sequences_are_refused() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.zeros(4, 3), torch.zeros(2, 3)])
    with pytest.raises(InputError, match=r"LSTM: expected a tensor of sequences of one length, found a PackedSequence"):
        LSTM(3, 4, rank=2)(packed)


def dense_tagger(torchs: type[nn.Module], **options: Any) -> Tagger:
    torch.manual_seed(0)
    return Tagger(torchs(3, 24, 2, batch_first=True, **options), 48 if options.get("bidirectional") else 24)


@pytest.mark.parametrize("kind", ["fedpara", "pfedpara", "lowrank"])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"bias": False, "dropout": 0.2}])
@every_pair
def test_conversion(pair: str, options: dict[str, Any], kind: Kind) -> None:
    ours, torchs = PAIRS[pair]
    model = dense_tagger(torchs, **options).eval()
    before = copy.deepcopy(model.state_dict())
    converted, report = convert(model, Factorization(kind=kind, gamma=0.1, exclude=("head",)))
    memory = converted.memory
    assert type(memory) is ours
    assert not memory.training
    names = [name for name, _ in model.memory.named_parameters() if name.startswith("weight")]
    assert [layer.name for layer in report.layers] == [*(f"memory.{name}" for name in names), "head"]
    reasons = {layer.name: layer.reason for layer in report.layers if layer.reason}
    inputs = [name for name in names if name.startswith("weight_ih_l0")]
    assert reasons.keys() == {"head", *(f"memory.{name}" for name in inputs)}
    assert all("full rank needs R = 2" in reasons[f"memory.{name}"] for name in inputs)
    for name, weight in memory.weights().items():
        assert weight.spec == next(layer.spec for layer in report.layers if layer.name == f"memory.{name}")
    for name, bias in memory.named_parameters(recurse=False):
        assert torch.equal(bias, before[f"memory.{name}"])
    for name in inputs:
        assert torch.equal(memory.get_submodule(name)(), before[f"memory.{name}"])
    x = torch.randn(4, 7, 3)
    with torch.no_grad():
        for name, weight in memory.weights().items():
            model.memory.get_parameter(name).copy_(weight())
    torch.testing.assert_close(converted(x), model(x))
    assert report.parameters_after == sum(p.numel() for p in converted.parameters()) < report.parameters
    again, second = convert(converted, Factorization(exclude=("head",)))
    assert {layer.reason for layer in second.layers} == {"already converted", "excluded"}
    assert torch.equal(again(x), converted(x))


@every_pair
def test_patterns_choose_single_weights(pair: str) -> None:
    model = dense_tagger(PAIRS[pair][1])
    options: dict[str, Any] = {
        "exclude": ["head", "*ih*"],
        "gamma_of": {"*_l1": 0.9},
        "rank_of": {"memory.weight_hh_l0": 5},
    }
    converted, _ = convert(model, Factorization(gamma=0.0, **options))
    ranks = {name: weight.spec.rank for name, weight in converted.memory.weights().items()}
    expected = choose_layer("", (converted.memory.gates * 24, 24), gamma=0.9).spec.rank
    assert ranks == {"weight_ih_l0": 0, "weight_hh_l0": 5, "weight_ih_l1": 0, "weight_hh_l1": expected}
    whole, report = convert(model, Factorization(exclude=("head", "memory.*")))
    assert type(whole.memory) is PAIRS[pair][1]
    assert not report.converted
    with pytest.raises(InputError, match=r"exclude: 'memory' matches none .*; did you mean 'memory\.\*'\?"):
        convert(model, Factorization(exclude=("memory",)))


class Subclass(nn.LSTM):
    pass


def test_layers_with_a_life_of_their_own_stay() -> None:
    model = nn.ModuleDict(
        {
            "projected": nn.LSTM(24, 24, proj_size=5),
            "subclass": Subclass(24, 24),
            "hooked": nn.GRU(24, 24),
            "computed": nn.GRU(24, 24),
            "frozen": nn.GRU(24, 24),
        }
    )
    model["hooked"].register_forward_hook(lambda *_: None)
    model["frozen"].weight_hh_l0.requires_grad_(False)
    del model["computed"]._parameters["weight_hh_l0"]
    model["computed"].weight_hh_l0 = torch.zeros(72, 24)
    converted, report = convert(model)
    assert {layer.name: layer.reason for layer in report.layers} == {
        **{f"projected.weight_{source}_l0": "projected state (proj_size=5)" for source in ("ih", "hh")},
        "projected.weight_hr_l0": "a part of its LSTM that is not the weight itself",
        **{
            f"subclass.weight_{source}_l0": "Subclass is a subclass, which may use its weight in its own way"
            for source in ("ih", "hh")
        },
        **{f"hooked.weight_{source}_l0": "has hooks, which would be lost" for source in ("ih", "hh")},
        **{
            f"computed.weight_{source}_l0": "one of the weights of its layer is computed by a hook"
            for source in ("ih", "hh")
        },
        "frozen.weight_ih_l0": "",
        "frozen.weight_hh_l0": "frozen (requires_grad=False)",
    }
    roles = {tensor.name: tensor.role for tensor in layout_of(converted["frozen"]).tensors}
    assert roles["weight_hh_l0.weight"] == "frozen"
    assert roles["weight_ih_l0.x1"] == "shared"


def test_tied_weights_stay_tied() -> None:
    layer = nn.LSTM(24, 24, 2)
    layer.weight_hh_l1 = layer.weight_hh_l0
    converted, report = convert(nn.ModuleDict({"memory": layer}))
    assert converted["memory"].weight_hh_l1.weight is converted["memory"].weight_hh_l0.weight
    reasons = {layer.name: layer.reason for layer in report.unchanged}
    assert reasons["memory.weight_hh_l0"].startswith("its weight is also 'memory.weight_hh_l1'")
    assert set(reasons) == {"memory.weight_hh_l0", "memory.weight_hh_l1"}


def test_a_lone_layer() -> None:
    converted, report = convert(nn.LSTM(24, 24))
    assert type(converted) is LSTM
    assert [layer.name for layer in report.converted] == ["weight_ih_l0", "weight_hh_l0"]
    assert [layer.name for layer in layout_of(converted).layers] == ["weight_ih_l0", "weight_hh_l0"]


@pytest.mark.parametrize("kind", ["fedpara", "pfedpara", "lowrank"])
@every_pair
def test_pretrained_weights_are_fitted(pair: str, kind: Kind) -> None:
    """A layer whose weights have the wanted structure keeps its outputs."""
    torch.manual_seed(0)
    model = PAIRS[pair][1](20, 24)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("weight"):
                rows, columns = parameter.shape
                parameter.copy_(0.3 * torch.randn(rows, 2) @ torch.randn(2, columns))
    converted, report = convert(model, Factorization(kind=kind, gamma=0.1), pretrained=True)
    assert len(report.converted) == 2
    for line in report.converted:
        assert line.relative_error is not None
        assert line.relative_error < 1e-3
    x = torch.randn(7, 4, 20)
    torch.testing.assert_close(converted(x)[0], model(x)[0], atol=0.02, rtol=0)
    for name, bias in converted.named_parameters(recurse=False):
        assert torch.equal(bias, model.get_parameter(name))


@pytest.mark.parametrize("kind", KINDS)
@every_pair
def test_layout(pair: str, kind: Kind) -> None:
    model = Tagger(PAIRS[pair][0](3, 24, 2, kind=kind, rank=0 if kind == "dense" else 3), 24)
    layout = layout_of(model)
    assert [tensor.name for tensor in layout.tensors] == list(model.state_dict())
    assert Layout.from_json(layout.to_json()) == layout
    names = [f"memory.weight_{source}_l{number}" for number in (0, 1) for source in ("ih", "hh")]
    assert [layer.name for layer in layout.layers] == [*names, "head"]
    assert layout.dense_parameters == sum(p.numel() for p in dense_tagger(PAIRS[pair][1]).parameters())
    personal = {tensor.name for tensor in layout.with_role("personal")}
    assert personal == ({f"{name}.{part}" for name in names for part in ("x2", "y2")} if kind == "pfedpara" else set())
    biases = {tensor.name: tensor.role for tensor in layout.tensors if "bias" in tensor.name}
    assert set(biases.values()) == {"shared"}
    compared = {layer.name for layer in layout.layers if sample_layer(layout, layer) is not None}
    assert compared == (set() if kind in ("dense", "update") else set(names))
