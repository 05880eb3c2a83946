"""BatchNorms of a model, fixed or by the statistics of each batch: converted, exported and trained like torch's."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from device_runtime import open_engine
from export import export_bundle
from export.forward.graph import forward_graph
from export.forward.outputs import Chosen
from export.forward.preprocess import Argument, Deployed, Preprocessing
from fedpara_edge.errors import InputError
from fedpara_edge.factors.factorization import Factorization
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.nn import convert, layout_of

IMAGE = (3, 8, 8)


def pretrained(*, shape: tuple[int, ...] = IMAGE, batchnorm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """A network whose BatchNorm has statistics and an affine map that are far from those of a new one."""
    torch.manual_seed(0)
    convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(shape) - 1]
    model = nn.Sequential(convolution(3, 8, 3, bias=False), batchnorm(8), nn.Tanh(), nn.Flatten(), nn.LazyLinear(5))
    model(torch.randn(2, *shape))
    for name, tensor in model[1].state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(8) + (name == "running_var"))
    return model


def export(model: nn.Module, folder: Path, shape: tuple[int, ...] = IMAGE, **more: object) -> dict:
    config = ExportConfig(name="test", input_shape=shape, input_dtype="float32", **more)
    return export_bundle(model, folder, config)


def frozen(model: nn.Module) -> nn.Module:
    model[1].eval()
    for parameter in model[1].parameters():
        parameter.requires_grad = False
    return model


FREEZE = Factorization(kind="dense", batchnorm="freeze")
BY_DEFAULT = Factorization(kind="dense")


@pytest.mark.parametrize("shape", [(3, 9), (3, 8, 8), (3, 4, 5, 6)])
def test_a_fixed_batchnorm_computes_what_torchs_does_in_evaluation(shape: tuple[int, ...]) -> None:
    classes = {2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}
    model = pretrained(shape=shape, batchnorm=classes[len(shape)]).double()
    x = torch.randn(4, *shape).double()
    expected = copy.deepcopy(model).eval()(x)
    for given in (model, frozen(copy.deepcopy(model))):
        converted, _ = convert(given, FREEZE)
        torch.testing.assert_close(converted.train()(x), expected)


def test_the_affine_map_of_a_fixed_batchnorm_is_trained_like_torchs(tmp_path: Path) -> None:
    model = pretrained()
    converted, report = convert(model, FREEZE)
    assert report.messages == ("1 BatchNorm with fixed statistics, affine trained",)
    assert [tensor.name for tensor in layout_of(converted).shared] == [
        "0.weight",
        "1.weight",
        "1.bias",
        "4.weight",
        "4.bias",
    ]
    bundle, verification = export(converted, tmp_path / "bundle")
    assert verification.keys() == {"ort-training", "onnxruntime"}
    x, y = torch.randn(4, *IMAGE), torch.arange(4)
    gradients = []
    for net in (model.eval(), converted):
        net.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        gradients.append([parameter.grad for parameter in net[1].parameters()])
    torch.testing.assert_close(*gradients)
    assert bundle.manifest.layout.tensors[1].part == "norm"


def test_a_frozen_batchnorm_is_one_product_and_one_sum_without_an_option(tmp_path: Path) -> None:
    converted, report = convert(frozen(pretrained()), BY_DEFAULT)
    assert report.messages == ("1 BatchNorm with fixed statistics, neither statistics nor affine trained or sent",)
    bundle, _ = export(converted, tmp_path / "bundle")
    layout = bundle.manifest.layout
    assert [tensor.name for tensor in layout.with_role("frozen")] == ["1.scale", "1.shift"]
    assert not [tensor for tensor in layout.shared if tensor.layer == "1"]
    graph = onnx.load(bundle.file("eval_step.onnx")).graph
    operators = [node.op_type for node in graph.node]
    start = operators.index("Conv")
    assert operators[start : start + 4] == ["Conv", "Mul", "Add", "Tanh"]


def test_statistics_of_a_new_batchnorm_are_remarked() -> None:
    _, report = convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)), FREEZE)
    assert report.messages == (
        "2 BatchNorms with fixed statistics, affine trained",
        "the fixed statistics are those of a new BatchNorm, 0 and 1; load pretrained ones",
    )


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(12,), (3, 9), (3, 8, 8)])
def test_a_batchnorm_without_running_statistics_trains_in_both_engines(
    shape: tuple[int, ...], affine: bool, tmp_path: Path
) -> None:
    classes = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d}
    norm = classes[len(shape)](8, track_running_stats=False, affine=affine)
    first = {
        1: nn.Linear(12, 8, bias=False),
        2: nn.Conv1d(3, 8, 3, bias=False),
        3: nn.Conv2d(3, 8, 3, bias=False),
    }[len(shape)]
    model = nn.Sequential(first, norm, nn.Tanh(), nn.Flatten(), nn.LazyLinear(5))
    model(torch.randn(2, *shape))
    if affine:
        norm.weight.data.uniform_(0.5, 2)
        norm.bias.data.uniform_(-1, 1)
    converted, report = convert(model, BY_DEFAULT)
    name = type(norm).__name__
    assert report.messages == (f"1: {name} normalizes every batch by its own statistics",)
    x = torch.randn(4, *shape)
    torch.testing.assert_close(converted.eval()(x), model.eval()(x))
    _, verification = export(converted, tmp_path / "bundle", shape)
    assert all(errors.worst <= errors.limit for errors in verification.values())  # two rows nearly cancel
    assert verification.keys() == {"ort-training", "onnxruntime"}


def test_a_batch_of_one_value_in_a_channel_is_its_bias(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Linear(12, 8, bias=False), nn.BatchNorm1d(8, track_running_stats=False), nn.Tanh(), nn.Linear(8, 5)
    )
    bundle, _ = export(convert(model, BY_DEFAULT)[0], tmp_path / "bundle", (12,))
    for name in bundle.manifest.engines:
        engine = open_engine(bundle, name)
        loss = engine.step(np.ones((1, 12), np.float32), np.zeros(1, np.int64), learning_rate=0.1, seed=0)
        assert np.isfinite(loss)


def test_a_relu6_of_exact_zeros_has_torchs_gradient(tmp_path: Path) -> None:
    # A depthwise convolution of a dead channel gives zeros, and a fixed BatchNorm that is new passes them on.
    torch.manual_seed(0)
    first, depthwise = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 3, groups=8, bias=False)
    first.weight.data[:4] = 0
    model = nn.Sequential(
        *(first, nn.BatchNorm2d(8), nn.ReLU6(), depthwise, nn.BatchNorm2d(8), nn.ReLU6()),
        *(nn.Conv2d(8, 8, 1), nn.Hardtanh(0.0, 2.0), nn.Hardtanh(-0.1, 0.2), nn.Flatten(), nn.LazyLinear(5)),
    )
    model(torch.randn(2, *IMAGE))
    _, verification = export(convert(model, FREEZE)[0], tmp_path / "bundle")
    assert verification.keys() == {"ort-training", "onnxruntime"}


class Activated(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(super().forward(x))


def test_a_batchnorm_with_a_forward_of_its_own_is_refused() -> None:
    for choice in ("refuse", "freeze", "group"):
        with pytest.raises(InputError, match=r"module '1': expected one of torch's BatchNorms, found Activated with"):
            convert(nn.Sequential(nn.Conv2d(3, 8, 3), Activated(8)), Factorization(batchnorm=choice))


def test_running_statistics_need_a_choice() -> None:
    for model in (pretrained(), pretrained().eval()):
        with pytest.raises(InputError, match=r"module '1': BatchNorm2d keeps running statistics.*freeze.*group"):
            convert(model, BY_DEFAULT)
    argument = Argument(None, Preprocessing("float32", IMAGE))
    with pytest.raises(InputError, match=r"module '1': expected no BatchNorm but what `convert` makes of it"):
        forward_graph(Deployed(pretrained(), [argument], Chosen()), {"x": torch.randn(4, *IMAGE)})
