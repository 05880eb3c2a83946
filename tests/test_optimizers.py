"""The optimizers in numpy are torch's."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from small_net import OPTIMIZERS

from device_runtime.engines.optimizers import adjust, make_optimizer
from device_runtime.engines.protocol import Adjustment

SIZES = (3, 1, 400)


def random(generator: np.random.Generator) -> list[np.ndarray]:
    return [generator.standard_normal(size, dtype=np.float32) for size in SIZES]


def torch_optimizer(constants: dict[str, Any], parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    options = {name: value for name, value in constants.items() if name != "name"}
    return {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[constants["name"]](parameters, lr=1.0, **options)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_torch(name: str) -> None:
    generator = np.random.default_rng(0)
    weights = random(generator)
    parameters = [torch.nn.Parameter(torch.from_numpy(weight.copy())) for weight in weights]
    reference, optimizer = torch_optimizer(OPTIMIZERS[name], parameters), make_optimizer(OPTIMIZERS[name], weights)
    for step in range(100):
        gradients, rate = random(generator), 0.01 / (1 + step)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = torch.from_numpy(gradient.copy())
        reference.param_groups[0]["lr"] = rate
        reference.step()
        optimizer.step(weights, gradients, rate)
    for weight, parameter in zip(weights, parameters, strict=True):
        np.testing.assert_allclose(weight, parameter.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_cut_into_pieces_does_not_matter(name: str) -> None:
    generator = np.random.default_rng(0)
    pieces, gradients = random(generator), random(generator)
    whole = [np.concatenate(pieces)]
    for weights in (pieces, whole):
        optimizer = make_optimizer(OPTIMIZERS[name], weights)
        for _ in range(3):
            grads = [g.copy() for g in gradients] if weights is pieces else [np.concatenate(gradients)]
            optimizer.step(weights, grads, 0.1)
    np.testing.assert_array_equal(np.concatenate(pieces), whole[0])


def test_sgd_of_an_older_bundle_has_no_momentum() -> None:
    assert make_optimizer({"name": "sgd"}, [np.zeros(2, np.float32)]).state == {}


@pytest.mark.parametrize("max_norm", [0.5, 1e3, math.inf])
def test_adjusted_gradients_are_those_of_torch(max_norm: float) -> None:
    generator = np.random.default_rng(0)
    weights, gradients, h = random(generator), random(generator), random(generator)
    parameters = [torch.nn.Parameter(torch.from_numpy(weight)) for weight in weights]
    for parameter, gradient, offset in zip(parameters, gradients, h, strict=True):
        parameter.grad = torch.from_numpy(gradient + np.float32(0.3) * parameter.detach().numpy() + offset)
    torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    adjust(gradients, weights, Adjustment(max_norm=max_norm, mu=0.3), h)
    for gradient, parameter in zip(gradients, parameters, strict=True):
        np.testing.assert_allclose(gradient, parameter.grad.numpy(), rtol=1e-5, atol=1e-7)


def test_gradients_that_are_not_finite_stay_so() -> None:
    gradients = [np.array([1, np.nan], np.float32)]
    adjust(gradients, gradients, Adjustment(max_norm=1.0), None)
    assert np.isnan(gradients[0]).all()
