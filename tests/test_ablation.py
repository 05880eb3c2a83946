"""The ablation program in plans/ablation: many models at once compute what one model of the library does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "plans" / "ablation"))
import federation
import images
import kinds
import network
import table
import variations

from fedpara_edge.factors.compose import compose_branch, part_shapes
from fedpara_edge.nn.zoo import cnn
from fedpara_edge.simulation.data.federation import DataPlan


def test_the_page_has_the_committed_results() -> None:
    assert table.PAGE.read_text(encoding="utf-8") == table.page()


@pytest.mark.parametrize("compute", [network.outputs, partial(network.together, act=network.activation)])
def test_many_models_compute_what_each_does(compute: Callable[..., torch.Tensor]) -> None:
    torch.manual_seed(0)
    models = [cnn(input_shape=(3, 16, 16), kind="dense") for _ in range(2)]
    images = torch.randn(2, 3, 3, 16, 16)
    each = [dict(model.named_parameters()) for model in models]
    weights = {}
    for name in network.CONVOLUTIONS:
        weights[name] = torch.stack([e[f"{name}.weight"].permute(0, 2, 3, 1).flatten(1) for e in each])
        weights[f"{name}.bias"] = torch.stack([e[f"{name}.bias"] for e in each])
        for part, theirs in (("scale", "weight"), ("shift", "bias")):
            weights[f"{name}.{part}"] = torch.stack([e[f"norm{name[-1]}.{theirs}"] for e in each])
    weights |= {"head": torch.stack([e["head.weight"] for e in each])}
    weights |= {"head.bias": torch.stack([e["head.bias"] for e in each])}
    weights = {name: tensor.detach().requires_grad_() for name, tensor in weights.items()}
    found = compute(weights, images.permute(0, 1, 3, 4, 2))
    expected = torch.stack([model(x) for model, x in zip(models, images, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    mine = torch.autograd.grad(found.square().sum(), [weights[name] for name in network.CONVOLUTIONS])
    expected.square().sum().backward()
    for name, gradient in zip(network.CONVOLUTIONS, mine, strict=True):
        theirs = torch.stack([e[f"{name}.weight"].grad.permute(0, 2, 3, 1).flatten(1) for e in each])
        torch.testing.assert_close(gradient, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("kind", "form"), [("fedpara", "tensor"), ("fedpara", "matrix"), ("lowrank", "tensor")])
def test_a_weight_is_that_of_the_library(kind: str, form: str) -> None:
    torch.manual_seed(0)
    layer = kinds.Layer("conv2", "matrix" if form == "matrix" else kind, 6, 4, 3)
    spec = layer.spec
    assert (spec.kind, spec.form) == (kind, form)
    theirs = {part: torch.randn(shape) for part, shape in part_shapes(spec).items()}
    expected = compose_branch(spec, theirs, 1)
    if kind == "fedpara":
        expected = expected * compose_branch(spec, theirs, 2)
    mine = layer.of_library(theirs)
    found = layer.compose({part: tensor[None] for part, tensor in mine.items()})[0]
    torch.testing.assert_close(found.view(6, 3, 3, 4).permute(0, 3, 1, 2), expected)


@pytest.mark.parametrize("kind", ["fedpara", "matrix", "lowrank"])
def test_the_curvature_is_the_square_of_the_jacobian(kind: str) -> None:
    layer = kinds.Layer("conv2", kind, 4, 3, 2)
    parts = layer.start([1])
    diagonal = kinds.curvature(layer, parts)
    for part, tensor in parts.items():
        jacobian = torch.autograd.functional.jacobian(lambda t, part=part: layer.compose({**parts, part: t}), tensor)
        expected = jacobian.square().sum((0, 1, 2))
        torch.testing.assert_close(diagonal[part], expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> images.Data:
    """Two clients of eight images each."""
    path = tmp_path_factory.mktemp("data") / "images.npz"
    random = np.random.default_rng(0)
    x, y = random.integers(0, 256, (24, 3, 16, 16), np.uint8), random.integers(0, 10, 24)
    np.savez(path, x=x[:16], y=y[:16], x_test=x[16:], y_test=y[16:])
    plan = DataPlan(path=path, clients=2, test=("x_test", "y_test"))
    return images.Data(plan, [1], images.Images(), torch.device("cpu"), batch_size=4, tests=8)


def batch(data: images.Data, structure: variations.Structure, *settings: variations.Setting) -> federation.Batch:
    found = federation.Batch(structure, [(setting, 1) for setting in settings], data, 2)
    for round in range(2):
        found.aggregate(found.train(round), round)
    return found


def test_runs_side_by_side_are_those_that_each_would_be(data: images.Data) -> None:
    structure = variations.Structure("update", (2, 2, 2), "sgd")
    settings = variations.Setting(lr=0.01), variations.Setting(lr=0.02, base_beta=0.5, beta=0.5, scale=2.0)
    for one, other in (settings, settings[::-1]):
        alone, among = batch(data, structure, one), batch(data, structure, one, other)
        torch.testing.assert_close(alone.theta[0], among.theta[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(alone.held["conv3.base"][0], among.held["conv3.base"][0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["fedpara", "matrix"])
@pytest.mark.parametrize("options", [{"preconditioned": True}, {"cyclic": True}])
def test_every_kind_trains(data: images.Data, kind: str, options: dict[str, bool]) -> None:
    structure = variations.Structure(kind, (2, 2, 2), "sgd", **options)
    found = batch(data, structure, variations.Setting(lr=0.001, frobenius=0.01, fedexp=True))
    assert torch.isfinite(found.theta).all()
    assert len(found.accuracy()) == 1


def test_factors_begin_with_the_weights_of_a_dense_warm_up(data: images.Data) -> None:
    structure = variations.Structure("lowrank-matrix", (64, 128, 256), warm_up=1)
    found, dense = (
        federation.Batch(each, [(variations.Setting(lr=0.01), 1)], data, 2) for each in (structure, structure.warm)
    )
    for each in (found, dense):
        each.aggregate(each.train(0), 0)
    torch.testing.assert_close(found.theta, dense.theta)
    expected, _ = dense.weights(dense.theta, dense.held)
    found.factorize()
    weights, _ = found.weights(found.theta, found.held)
    assert [layer.kind for layer in found.layers] == ["dense", *["lowrank-matrix"] * 3]
    for name, tensor in weights.items():
        if name in expected:
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)
    whole = federation.Batch(structure, [(variations.Setting(lr=0.01), 1)], data, 2)
    assert whole.run((1, 2))[0]["accuracy"].keys() == {1, 2}
    assert whole.numbers == found.numbers != dense.numbers


def test_some_layers_are_dense_and_channels_are_wider(data: images.Data) -> None:
    structure = variations.Structure("fedpara", (0, 2, 2), width=2)
    found = federation.Batch(structure, [(variations.Setting(lr=0.01), 1)], data, 1)
    assert [(layer.kind, layer.outputs) for layer in found.layers] == [
        ("dense", 64),
        ("dense", 128),
        ("fedpara", 256),
        ("fedpara", 512),
    ]
    assert torch.isfinite(found.train(0)).all()
