"""The rate that is said to be stable is, a higher one is not, and factors that start as the model's weights keep it."""

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Command
from heads import deployed, head
from torch import nn
from torch.nn import functional as F

import export.build
from export import make_bundle
from export.batches import Batch, Batches
from export.forward.ownloss import LoadedLoss
from export.reference import loss_in_torch
from export.stability import StableRates, stable_rate, stable_rates
from fedpara_edge.factors.factorization import Factorization
from fedpara_edge.factors.layout import Kind
from fedpara_edge.formats.interface import ArraySpec
from fedpara_edge.formats.recipe import Recipe
from fedpara_edge.nn import FactoredLayer, convert
from fedpara_edge.nn.selection import find_weights

torch.set_num_threads(1)  # the tensors are too small for threads to pay


def regression() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 1), nn.Flatten(0))


def rate_of(model: nn.Module, x: torch.Tensor, loss: str = "mse") -> float | None:
    """Stable rate of a model of one output on inputs, with labels that are zero."""
    shape = tuple(model(x).shape[1:])
    each = head(loss, *shape)
    labels = np.zeros((len(x), *each.label.shape), each.label.dtype)
    return stable_rate(deployed(model, *x.shape[1:]), [each], Batch({"x": x.numpy()}, {each.label.name: labels}))


def rms(weight: torch.Tensor) -> float:
    return weight.detach().square().mean().sqrt().item()


@pytest.mark.parametrize(("share", "diverges"), [(0.9, False), (1.1, True)])
@pytest.mark.parametrize("loss", ["mse", "bce", "cross_entropy:label_smoothing=1", "huber"])
def test_a_linear_model_is_stable_up_to_its_rate(loss: str, share: float, diverges: bool) -> None:
    """From close to its minimum, which is at zero, so that the curvature stays what it is."""
    torch.manual_seed(0)
    model, x = nn.Linear(6, 3), torch.randn(20, 6)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=1e-3)
    each, rate = head(loss, 3), rate_of(model, x, loss)
    y = torch.full((20, 3), 0.5 if loss == "bce" else 0.0)
    labels = {each.label.name: torch.zeros(20, dtype=torch.int64) if each.label.classes else y}
    assert rate is not None
    losses = []
    for _ in range(60):
        value = loss_in_torch([each], {each.output.name: model(x)}, labels)
        model.zero_grad()
        value.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= share * rate * parameter.grad
        losses.append(value.item())
    assert (losses[-1] > losses[0]) == diverges


def test_attention_and_recurrent_layers_have_a_rate() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert rate_of(layer, torch.randn(2, 5, 32)) is not None
    assert layer.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert rate_of(nn.Sequential(nn.Flatten(), nn.Linear(160, 3).requires_grad_(False)), torch.ones(2, 160)) is None


@pytest.mark.parametrize("kind", ["fedpara", "pfedpara", "lowrank"])
def test_own_starts_with_the_size_of_the_models_weights_and_its_biases(kind: Kind) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(64, 96),
            "conv": nn.Conv2d(32, 48, 3),
            "conv1d": nn.Conv1d(32, 48, 5),
            "lstm": nn.LSTM(48, 48),
            "attention": nn.MultiheadAttention(64, 4),
        }
    )
    nn.init.orthogonal_(model["lstm"].weight_hh_l0, gain=0.3)
    converted, report = convert(model, Factorization(kind=kind, init="own"))
    weights = find_weights(model)
    assert len(report.converted) == 9
    for line in report.converted:
        layer, own = converted.get_submodule(line.name), weights[line.name].value
        assert isinstance(layer, FactoredLayer)
        assert own is not None
        assert rms(layer.compose()) == pytest.approx(rms(own), rel=1e-4)
    for name in ("linear", "conv", "conv1d"):
        assert torch.equal(converted[name].bias, model[name].bias)


def test_own_keeps_the_rate_of_the_dense_model_and_he_does_not() -> None:
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    for seed in range(3):
        torch.manual_seed(seed)
        dense = regression()
        composed, own = (convert(dense, Factorization(init=init))[0] for init in ("composed", "own"))
        rates = {name: rate_of(each, x) for name, each in (("dense", dense), ("composed", composed), ("own", own))}
        assert StableRates(rates["composed"], rates["dense"]).falls_short
        assert 3 < rates["dense"] / rates["composed"] < 10
        assert not StableRates(rates["own"], rates["dense"]).falls_short
        assert rates["own"] / rates["dense"] == pytest.approx(1, abs=0.3)


def test_own_trains_at_a_rate_of_the_dense_model_at_which_he_diverges() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 16, generator=generator)
    y = torch.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2]
    losses: dict[str, list[float]] = {"dense": [], "composed": [], "own": []}
    for seed in range(3):
        torch.manual_seed(seed)
        model = regression()
        for name in losses:
            made = copy.deepcopy(model) if name == "dense" else convert(model, Factorization(init=name))[0]  # type: ignore[arg-type]
            losses[name].append(_trained(made, x, y, rate=0.1))
    before = y.var().item()
    assert all(loss < before for loss in (*losses["dense"], *losses["own"]))
    assert sum(loss < before for loss in losses["composed"]) < 3


def _trained(model: nn.Module, x: torch.Tensor, y: torch.Tensor, *, rate: float) -> float:
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for step in range(60):
        rows = slice(32 * step % 256, 32 * step % 256 + 32)
        optimizer.zero_grad()
        F.mse_loss(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return F.mse_loss(model(x), y).item()


MODEL = """
from torch import nn

def net():
    return nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 1), nn.Flatten(0))
"""


def test_the_export_says_which_rate_is_stable(run: Command, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    options = (f"{tmp_path}/model.py:net", "--input-shape", "16", "--engines", "onnxruntime", "-o", tmp_path / "o")
    ended = run("export", *options, "--loss", "mse")
    assert re.search(r"^SGD starts without overshooting up to a rate of 0\.0\d+ \(dense: 0\.", ended.out, re.M)
    assert "on random inputs" in ended.out
    assert "export with --init own to start as the dense model does" in ended.out
    ended = run("export", *options, "--loss", "mse", "--init", "own", "--overwrite", "--json")
    assert ended.json["stable_rates"]["factored"] > ended.json["stable_rates"]["dense"] / 2
    ended = run("export", *options, "--loss", "mse", "--optimizer", "adamw", "--overwrite", "--json")
    assert ended.json["stable_rates"] is None


@pytest.mark.slow
def test_the_export_of_a_classifier_says_which_rate_is_stable_on_its_example(run: Command, tmp_path: Path) -> None:
    """Images with a mean, as real ones have, need a smaller rate than noise does."""
    generator = np.random.default_rng(0)
    x = (generator.standard_normal((64, 1, 28, 28)) + 1).astype(np.float32)
    np.savez(tmp_path / "example.npz", x=x, y=generator.integers(0, 10, 64))
    options = ("mlp", "--input-dtype", "float32", "--engines", "onnxruntime", "-o", tmp_path / "o")
    ended = run("export", *options, "--example", tmp_path / "example.npz", "--momentum", "0.9")
    told = (
        r"^SGD starts without overshooting up to a rate of (0\.\d+) \(dense: 0\.\d+\) on the example; a higher one may "
    )
    line = re.search(told, ended.out, re.M)
    assert line is not None, ended.out
    drawn = run("export", *options, "--overwrite", "--json").json["stable_rates"]
    assert drawn["drawn"]
    assert float(line[1]) < drawn["factored"] / 1.5


SIBLINGS = """
import torch
from torch import nn

class Reading(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(30, 24), nn.LSTM(24, 96, batch_first=True)
        self.head = nn.Linear(96, 30)

    def forward(self, x):
        return self.head(16 * self.lstm(self.embedding(x))[0]).movedim(-1, 1)

class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.signal, self.day = nn.Linear(48, 64), nn.Embedding(7, 64)
        self.kind, self.load = nn.Linear(64, 5), nn.Linear(64, 1)

    def forward(self, signal, day):
        hidden = torch.relu(self.signal(signal) + self.day(day))
        return {"kind": self.kind(hidden), "load": self.load(hidden).flatten()}

class Louder(nn.Module):
    def forward(self, x):
        return 4 * x

def images(*extra):
    return nn.Sequential(nn.Conv2d(3, 32, 3), *extra, nn.ReLU(), Louder(), nn.Flatten(), nn.Linear(32 * 36, 10))

def plain():
    return images()

def normalized():
    return images(nn.BatchNorm2d(32))

def hard():
    return images(nn.Hardsigmoid())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "options", "is_known"),
    [
        ("Reading", {"input_shape": (12,), "input_dtype": "int64", "tokens": 30}, True),
        (
            "Several",
            {
                "input": ("signal:shape=48", "day:dtype=int64,tokens=7"),
                "loss": ("kind=cross_entropy:label_smoothing=0.1", "load=huber:weight=0.5"),
            },
            True,
        ),
        ("plain", {"input_shape": (3, 8, 8), "freeze": ("0",)}, True),
        ("plain", {"input_shape": (3, 8, 8), "kind": "update"}, True),
        ("plain", {"input_shape": (3, 8, 8), "kind": "dense"}, True),
        ("plain", {"input_shape": (3, 8, 8), "personal": ("4",)}, True),
        ("plain", {"input_shape": (3, 8, 8), "jacobian_correction": 0.1}, False),
        ("normalized", {"input_shape": (3, 8, 8), "batchnorm": "freeze"}, True),
        ("normalized", {"input_shape": (3, 8, 8), "batchnorm": "train"}, False),
        ("hard", {"input_shape": (3, 8, 8)}, False),
    ],
)
def test_models_of_every_kind_are_told_their_rate_or_none(
    model: str, options: dict[str, Any], is_known: bool, tmp_path: Path
) -> None:
    (tmp_path / "model.py").write_text(SIBLINGS)
    recipe = Recipe(name=f"{tmp_path}/model.py:{model}", engines=("onnxruntime",), **options)
    rates = make_bundle(recipe, tmp_path / "bundle").rates
    assert (rates is not None) == is_known
    if rates is not None:
        assert (rates.dense is None) == (options.get("kind") == "dense")


def test_an_export_does_not_fail_for_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise TypeError("unlike any that is expected")

    monkeypatch.setattr(export.build, "stable_rates", fail)
    (tmp_path / "model.py").write_text(MODEL)
    recipe = Recipe(name=f"{tmp_path}/model.py:net", input_shape=(16,), loss=("mse",), engines=("onnxruntime",))
    made = make_bundle(recipe, tmp_path / "bundle")
    assert made.rates is None
    assert made.bundle.path == tmp_path / "bundle"


def rates_of(model: nn.Module, *, x: torch.Tensor, loss: str = "mse") -> StableRates | None:
    """What an export tells of a model on some rows."""
    made, spec = deployed(model, *x.shape[1:]), ArraySpec("x", tuple(x.shape[1:]), "float32")
    preprocessings = [argument.preprocessing for argument in made.arguments]
    heads = [head(loss, *model(x[:1]).shape[1:])]
    source = Batches(inputs=[spec], preprocessings=preprocessings, heads=heads, seed=0, examples={"x": x.numpy()})
    return stable_rates(made, None, heads, source)


def test_nothing_is_said_of_a_start_from_which_the_curvature_soon_grows() -> None:
    """Torch's own initialization lets hardly a signal through four linear layers; He's does."""
    torch.manual_seed(0)
    widths = [nn.Linear(64, 64) for _ in range(4)]
    model = nn.Sequential(*(part for layer in widths for part in (layer, nn.ReLU())), nn.Linear(64, 10))
    x = torch.randn(64, 64)
    rate = rate_of(model, x, "cross_entropy")
    assert rate is not None
    assert rate > 1
    assert rates_of(model, x=x, loss="cross_entropy") is None
    factored, _ = convert(model)
    rates = rates_of(factored, x=x, loss="cross_entropy")
    assert rates is not None
    assert rates.factored < 0.3
    assert not rates.drawn


def test_nothing_is_said_of_models_for_which_it_takes_too_long() -> None:
    large = nn.Sequential(nn.Linear(8, 12_000_000, bias=False), nn.AdaptiveAvgPool1d(1))
    slow = nn.Sequential(
        nn.Unflatten(1, (1, 32, 32)), *(nn.Conv2d(n, 128, 5, padding=2) for n in (1, 128)), nn.Flatten()
    )
    assert rates_of(large, x=torch.randn(4, 8)) is None
    assert rates_of(slow, x=torch.randn(4, 1024)) is None


def test_labels_of_an_own_loss_must_be_real() -> None:
    model, x = deployed(nn.Linear(8, 3), 8), np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32) * 2
    each = head(LoadedLoss(function="mse", module=nn.MSELoss()), 3)
    source = Batches(
        inputs=[ArraySpec("x", (8,), "float32")],
        preprocessings=[argument.preprocessing for argument in model.arguments],
        heads=[each],
        seed=0,
        examples={"x": x},
    )
    assert stable_rates(model, None, [each], source) is None
    real = replace(source, examples={"x": x, each.label.name: x[:, :3]})
    assert stable_rates(model, None, [each], real) is not None


def test_the_rates_in_words() -> None:
    assert str(StableRates(0.0213, 0.1049)) == (
        "SGD starts without overshooting up to a rate of 0.021 (dense: 0.1) on the example; a higher one may train too"
    )
    assert str(StableRates(0.0213, drawn=True)) == (
        "SGD starts without overshooting up to a rate of 0.021 on random inputs; a higher one may train too"
    )
