"""The rate that is said to be stable is, twice that is not, and factors that start as the model's weights keep it."""

import copy
from pathlib import Path

import pytest
import torch
from command_line import Command
from torch import nn
from torch.nn import functional as F

from export.stability import StableRates, stable_rate, stable_rates
from fedpara_edge.factors.factorization import Factorization
from fedpara_edge.factors.layout import Kind
from fedpara_edge.nn import FactoredLayer, convert
from fedpara_edge.nn.selection import find_weights

torch.set_num_threads(1)  # the tensors are too small for threads to pay


def regression() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 1), nn.Flatten(0))


def rms(weight: torch.Tensor) -> float:
    return weight.detach().square().mean().sqrt().item()


@pytest.mark.parametrize(("share", "diverges"), [(0.9, False), (1.1, True)])
def test_a_linear_model_is_stable_up_to_its_rate(share: float, diverges: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 6)
    y, model = torch.randn(20, 2), nn.Linear(6, 2)
    rate = stable_rate(model, x)
    assert rate is not None
    losses = []
    for _ in range(300):
        loss = F.mse_loss(model(x), y)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= share * rate * parameter.grad
        losses.append(loss.item())
    assert (losses[-1] > losses[0]) == diverges


def test_the_curvature_is_that_of_the_factors() -> None:
    """2 Jᵀ J / n, whose largest eigenvalue is found without forming J."""
    torch.manual_seed(0)
    model, _ = convert(nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 16)), Factorization(gamma=0))
    x = torch.randn(5, 8)
    outputs = model(x).reshape(-1)
    rows = [torch.autograd.grad(output, list(model.parameters()), retain_graph=True) for output in outputs]
    jacobian = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
    largest = 2 / len(outputs) * torch.linalg.matrix_norm(jacobian, 2).item() ** 2
    assert stable_rate(model, x) == pytest.approx(2 / largest, rel=0.02)


def test_attention_and_recurrent_layers_have_a_rate() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert stable_rate(layer, torch.randn(2, 5, 32)) is not None
    assert layer.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert stable_rate(nn.Sequential(nn.Flatten(), nn.Linear(160, 3).requires_grad_(False)), torch.ones(2, 160)) is None


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
        rates = stable_rates(composed, dense, x)
        assert rates is not None
        assert rates.falls_short
        assert 3 < rates.dense / rates.factored < 10
        kept = stable_rates(own, dense, x)
        assert kept is not None
        assert not kept.falls_short
        assert kept.factored / kept.dense == pytest.approx(1, abs=0.3)


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
    assert "SGD is sure to be stable up to a rate of 0.0" in ended.out
    assert "export with --init own to start as the dense model does" in ended.out
    ended = run("export", *options, "--loss", "mse", "--init", "own", "--overwrite", "--json")
    assert ended.json["stable_rates"]["factored"] > ended.json["stable_rates"]["dense"] / 2
    ended = run("export", *options, "--loss", "mse", "--optimizer", "adamw", "--overwrite", "--json")
    assert ended.json["stable_rates"] is None


def test_the_rates_in_words() -> None:
    assert str(StableRates(0.0213, 0.1049)) == (
        "SGD is sure to be stable up to a rate of 0.021 at the start, the dense model up to 0.1"
    )
