"""The MobileNets of the zoo: their sizes, what is factored, and that both engines train them like torch."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from device_runtime import open_engine
from device_runtime.engines.registry import ENGINES
from export import export_bundle
from fedpara_edge.factors.factorization import Factorization
from fedpara_edge.factors.layout import KINDS, Kind
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.nn import ZOO, FactoredLayer, convert, mobilenet_v2, mobilenet_v3_small
from fedpara_edge.nn.selection import is_depthwise

NARROW = {"mobilenetv2": partial(mobilenet_v2, width=0.1), "mobilenetv3-small": partial(mobilenet_v3_small, width=0.25)}
SHAPE = (3, 32, 32)
both = pytest.mark.parametrize("name", NARROW)


@pytest.mark.parametrize(("factory", "published"), [(mobilenet_v2, 3_504_872), (mobilenet_v3_small, 2_542_856)])
def test_sizes_are_the_published_ones(factory: Callable[..., nn.Module], published: int) -> None:
    assert sum(parameter.numel() for parameter in factory(1000, kind="dense").parameters()) == published


def test_tensors_have_the_names_of_pretrained_weights() -> None:
    names = mobilenet_v2(kind="dense").state_dict()
    assert {"features.0.0.weight", "features.1.conv.0.0.weight", "features.2.conv.3.running_var"} <= names.keys()
    assert {"features.18.1.bias", "classifier.1.weight"} <= names.keys()
    names = mobilenet_v3_small(kind="dense").state_dict()
    assert {"features.1.block.1.fc1.bias", "features.12.0.weight", "classifier.0.weight", "classifier.3.bias"} <= (
        names.keys()
    )


@pytest.mark.parametrize(("size", "left"), [(96, 3), (32, 4), (64, 2)])
@both
def test_small_images_are_halved_less_often(name: str, size: int, left: int) -> None:
    dense = NARROW[name](5, (3, size, size), kind="dense")
    assert dense.features(torch.randn(1, 3, size, size)).shape[2:] == (left, left)


@both
@pytest.mark.parametrize("kind", KINDS)
def test_pointwise_convolutions_are_factored(name: str, kind: Kind) -> None:
    model = ZOO[name].factory(kind=kind)
    factored = {name for name, module in model.named_modules() if isinstance(module, FactoredLayer)}
    depthwise = {name for name, module in model.named_modules() if is_depthwise(module)}
    assert len(depthwise) > 10
    assert (len(factored) > 15) == (kind != "dense")
    assert not factored & {*depthwise, *ZOO[name].dense_layers}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "choice"), [("mobilenetv2", "train"), ("mobilenetv3-small", "freeze")])
def test_both_engines_train_a_mobilenet_like_torch(name: str, choice: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = NARROW[name](5, SHAPE, kind="dense")
    converted, _ = convert(fitting(dense), Factorization(kind="dense", batchnorm=choice))
    config = ExportConfig(name="test", input_shape=SHAPE, input_dtype="float32")
    bundle, verification = export_bundle(converted, tmp_path / "bundle", config)  # loss, gradients and statistics
    assert verification.keys() == set(ENGINES)
    x, y = np.random.default_rng(0).random((6, *SHAPE), np.float32), np.arange(6) % 5
    losses = []
    for name in ENGINES:
        engine = open_engine(bundle, name, threads=1)
        losses.append([engine.step(x, y, learning_rate=1e-5, seed=0) for _ in range(3)])
    # Steps so small that they don't carry an entry over a kink; a gradient off by 2 in a thousand is seen all the same.
    np.testing.assert_allclose(*losses, rtol=3e-6)


def fitting(dense: nn.Module) -> nn.Module:
    """The model without dropout, whose running statistics are those of some images."""
    for module in dense.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        dense(torch.rand(16, *SHAPE))
    for module in dense.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return dense
