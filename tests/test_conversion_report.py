"""The report of a conversion accounts for every trained entry, and says what to do where little is saved."""

import pytest
import torch
from torch import nn

from fedpara_edge.factors.factorization import Factorization
from fedpara_edge.nn import ZOO, convert, load_model

torch.set_num_threads(1)  # the tensors are too small for threads to pay


class Everything(nn.Module):
    """Layers that are factored, layers that can't be, and parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.token = nn.Parameter(torch.randn(20, 32)), nn.Parameter(torch.randn(1, 1, 32))
        self.embedding, self.bag = nn.Embedding(200, 32), nn.EmbeddingBag(50, 16)
        self.attention = nn.MultiheadAttention(32, 4, add_bias_kv=True)
        self.rnn, self.lstm = nn.RNN(32, 32), nn.LSTM(32, 32)
        self.bilinear = nn.Bilinear(8, 8, 4)
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(32, 32, 3))
        self.norm = nn.LayerNorm((4, 32))
        self.frozen = nn.Linear(32, 32).requires_grad_(False)
        self.decoder = nn.Linear(32, 200)
        self.decoder.weight = self.embedding.weight


def trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("options", [{}, {"kind": "dense"}, {"exclude": ("attention.*",)}, {"kind": "lowrank"}])
def test_the_rows_add_up(options: dict[str, object]) -> None:
    model = Everything()
    converted, report = convert(model, Factorization(**options))  # type: ignore[arg-type]
    assert report.parameters == trained(model)
    assert report.parameters_after == trained(converted)


@pytest.mark.parametrize("name", ZOO)
def test_the_rows_of_the_zoo_add_up(name: str) -> None:
    model = load_model(name)
    options = Factorization(exclude=ZOO[name].dense_layers, batchnorm=ZOO[name].batchnorm)
    converted, report = convert(model, options)
    assert (report.parameters, report.parameters_after) == (trained(model), trained(converted))
    again = convert(converted, Factorization(exclude=("*",)))[1]
    assert again.parameters == again.parameters_after == trained(converted)


def test_every_dense_weight_has_a_reason() -> None:
    _, report = convert(Everything())
    reasons = {layer.name: layer.reason for layer in report.unchanged}
    assert reasons["positions"] == "a parameter of Everything itself, of no layer in it"
    assert reasons["bag.weight"] == "EmbeddingBag has no factored form"
    assert reasons["rnn.weight_hh_l0"] == "RNN has no factored form"
    assert reasons["bilinear.weight"] == "Bilinear has no factored form"
    assert reasons["frozen"] == "frozen (requires_grad=False)"
    assert reasons["embedding"] == "its weight is also 'decoder.weight', and a composed weight can't be tied"
    assert reasons["decoder"] == "its weight is also 'embedding.weight', and a composed weight can't be tied"
    assert reasons["conv"].startswith("ParametrizedConv1d is a subclass")
    assert {layer.name for layer in report.converted} == {
        *(f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
    }
    entries = {layer.name: layer.entries for layer in report.layers}
    assert (entries["embedding"], entries["decoder"], entries["frozen"]) == (6400, 0, 0)


def test_the_text_has_a_row_for_vectors_and_the_total() -> None:
    _, report = convert(nn.Sequential(nn.Linear(784, 256), nn.LayerNorm(256), nn.Linear(256, 2)))
    assert str(report).splitlines() == [
        "0: fedpara R=24, 200,704 -> 49,920 entries",
        "2: unchanged, 512 entries: full rank needs R = 2, whose 1032 factor entries are more than the 512 of the "
        "dense weight",
        "biases, normalizations and other vectors: 770 entries",
        "201,986 -> 51,202 parameters",
    ]


@pytest.mark.parametrize(
    ("model", "options", "remedy"),
    [
        (nn.Sequential(nn.Linear(32, 32)), {}, "take a smaller gamma, or send updates through a codec such as int4"),
        (
            nn.Sequential(nn.Linear(64, 512), nn.Linear(512, 64)),
            {"exclude": ("0",)},
            "include it, or send updates through a codec such as int4",
        ),
        (
            nn.Sequential(nn.EmbeddingBag(500, 64), nn.Linear(64, 64)),
            {},
            "EmbeddingBag has no factored form; make it of layers that are factored, or send updates through a codec "
            "such as int4",
        ),
    ],
)
def test_little_that_is_saved_is_warned_of(model: nn.Module, options: dict[str, object], remedy: str) -> None:
    _, report = convert(model, Factorization(**options))  # type: ignore[arg-type]
    saved = 1 - report.parameters_after / report.parameters
    assert saved < 0.5
    assert report.warning.startswith(f"warning: only {saved:.0%} of the parameters are saved, and ")
    assert report.warning.endswith(remedy)
    assert str(report).endswith(report.warning)


def test_no_warning_where_half_is_saved_or_nothing_was_to_be() -> None:
    model = nn.Sequential(nn.Linear(784, 256), nn.Linear(256, 2))
    assert not convert(model)[1].warning
    assert not convert(model, Factorization(kind="dense"))[1].warning
    assert not convert(convert(model, Factorization(exclude=("1",)))[0], Factorization(exclude=("1",)))[1].warning
