"""Both engines differentiate every operator that onnxruntime-training does, and more, and find torch's gradients."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from norms import relative_error
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx.backend.test.case.node import collect_testcases
from onnxruntime import SessionOptions
from onnxruntime.capi._pybind_state import Fail, GradientGraphBuilder, InvalidArgument, InvalidGraph
from step_models import IMAGE, SEQUENCE, VECTOR, VOLUME, Formula, batch, gradient_of, net, run, run_step
from torch import nn
from torch.nn import functional as F

from export import export_bundle
from export.comparison import TOLERANCE
from export.forward.graph import INPUT, IR_VERSION, LABEL, OPSET, ForwardGraph
from export.forward.outputs import OUTPUT
from export.gradients import RULES
from export.native import NATIVE
from export.step.training_step import StepSpec, write_steps
from export.step.weight_update import optimizer_constants
from fedpara_edge.factors.layout import TensorSpec
from fedpara_edge.formats.bundle import ENGINES
from fedpara_edge.formats.interface import ArraySpec, Head
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.losses import find_loss

# What RegisterGradientBuilders of orttraining/core/graph/gradient_builder_registry.cc enters in onnxruntime 1.19.2, but
# for what is no operator of ONNX; `test_the_list_is_that_of_the_runtime` asks the runtime itself.
ORT_TRAINING = NATIVE | {"ConvTranspose", "Resize"}  # which it can't run
WITHOUT_EXAMPLE = {
    "Cast": "onnx's examples for it are of other dtypes",
    "Trilu": "onnx's examples for it are of integers",
    "LSTM": "it first becomes an operator of the runtime's own",
    "GRU": "it first becomes an operator of the runtime's own",
}
WITHOUT_RULE = {
    "AveragePool": "the exporter writes a ReduceMean or a Conv: export.forward.pooling",
    "Dropout": "it becomes a product with a mask in the forward pass: export.step.dropout",
    "Gelu": "of opset 20; the exporter writes opset 18, Erf or Tanh",
    "GRU": "it becomes recurrences in the forward pass: export.gradients.recurrent",
    "LSTM": "it becomes recurrences in the forward pass: export.gradients.recurrent",
    "SoftmaxCrossEntropyLoss": "the loss comes with its gradient: export.step.losses",
}


@dataclass(frozen=True)
class Case:
    """Operators on the way of a gradient, and a model that exports to them for examples of a shape."""

    operators: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]


def formula(operators: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Case:
    return Case(operators, lambda: Formula(function), VECTOR)


class Branches(nn.Module):
    """Several layers side by side, after a convolution and before a linear layer."""

    def __init__(self, *branches: nn.Module, shape: tuple[int, ...] = IMAGE) -> None:
        super().__init__()
        self.first = (nn.Conv2d if len(shape) == 3 else nn.Conv3d)(2, 2, 1)
        self.branches, self.last = nn.ModuleList(branches), nn.LazyLinear(5)
        self(torch.zeros(2, *shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.last(torch.cat([branch(y).flatten(1) for branch in self.branches], 1))


def smooth(x: torch.Tensor) -> torch.Tensor:
    waves = x.sin() * x.cos() + x.tanh() * x.sigmoid() + torch.erf(x) - (-x).exp()
    return waves + (x.square() + 1).sqrt() + (x.square() + 1).log() + (x.abs() + 1).reciprocal().clone()


def moved(x: torch.Tensor) -> torch.Tensor:
    y = F.pad(x.view(-1, 3, 4).transpose(1, 2).triu(), (1, 2), value=0.5).unsqueeze(1).expand(-1, 2, -1, -1)
    z = torch.cat([y[:, :, 1:], y], 2).repeat(1, 1, 1, 2)
    return torch.cat([F.glu(z, 3).flatten(1), x.view(-1, 1, 12).squeeze(1)], 1)


def chosen(x: torch.Tensor) -> torch.Tensor:
    repeated = torch.index_select(x, 1, torch.tensor([0, 0, 3]))
    largest = x.topk(3)[0] * torch.gather(x, 1, x.argsort(1)[:, :3])
    one = x[torch.arange(x.shape[0]), x.argmax(1)][:, None] + x.view(-1, 3, 4)[:, [0, 1, 1], [2, -1, -1]]
    return torch.cat([repeated, largest, one], 1)


def put(x: torch.Tensor) -> torch.Tensor:
    y = x.scatter(1, x.argsort(1)[:, :3], 2 * x[:, :3]) + torch.slice_scatter(x, x[:, :3] * 2, 1, 2, 5)
    y[:, 1] = x[:, 2] * 3
    return y


def curves(x: torch.Tensor) -> torch.Tensor:
    half = x.tanh() / 2
    angles = half.tan() + half.asin() + half.acos() + half.atan() + half.atanh()
    return angles + half.sinh() + half.cosh() + x.asinh() + (x.abs() + 2).acosh() + F.softsign(x)


def rows_of_pixels(x: torch.Tensor) -> torch.Tensor:
    """Pixel shuffle, and pooling of examples without channels."""
    pixels = F.pixel_shuffle(x.view(-1, 4, 1, 3), 2).flatten(1)
    pooled = [F.avg_pool1d(x, 3), F.max_pool1d(x, 3), F.adaptive_avg_pool1d(x, 5), F.adaptive_max_pool1d(x, 5)]
    return torch.cat([pixels, *pooled], 1)


def padded(x: torch.Tensor) -> torch.Tensor:
    images = x.view(-1, 1, 3, 4)
    modes = ("replicate", "reflect", "circular")
    return torch.cat([F.pad(images, (3, 2, 1, 2), mode=mode).flatten(1) for mode in modes], 1)


def along_the_batch(x: torch.Tensor) -> torch.Tensor:
    stacked = torch.cat([x, x.flip(0), x.repeat(2, 1)], 0)
    distances = (x[:, None] - x[None]).square().sum(2)
    return stacked[::4] * x[x.argsort(0)[:, 0]] + distances @ x


def tied(x: torch.Tensor) -> torch.Tensor:
    """Extrema of halves, most of which several entries attain; one of them is the chosen one."""
    halves = (2 * x).round() / 2 + (x - x.detach())
    return halves.amin(1, keepdim=True) + halves.view(-1, 3, 4).max(2)[0].repeat(1, 4)


def added_up(x: torch.Tensor) -> torch.Tensor:
    return x.scatter_add(1, x.argsort(1)[:, [0, 0, 1]], x[:, :3]) + x.index_add(1, torch.tensor([0, 3, 3]), x[:, 2:5])


def sums_of_products(x: torch.Tensor) -> torch.Tensor:
    """Products of two and of three operands, sums over indices of one of them, and a diagonal."""
    a, b, squares = x.view(-1, 3, 4), x.tanh().view(-1, 4, 3), x[:, :9].view(-1, 3, 3)
    results = [
        torch.einsum("bij,bjk->bki", a, b),
        torch.einsum("bi,bj,bik->bkj", x[:, :3], x[:, 3:5], a),
        torch.einsum("bij,bk->bi", a, x),
        torch.einsum("...ij,...jk", a, b),
        torch.einsum("bii,bij->bj", squares, a),
        torch.einsum("ij,bj->bi", torch.ones(2, 12, dtype=x.dtype), x),
    ]
    return torch.cat([result.flatten(1) for result in results], 1)


class Directions(nn.Module):
    """Recurrent layers in both directions, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.lstm = nn.GRU(3, 4, bidirectional=True), nn.LSTM(8, 3, 2, bidirectional=True)
        self.last = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.gru(x.permute(2, 0, 1))
        return self.last(self.lstm(y)[0].amax(0))


CASES = {
    "functions": formula("Abs Cos Erf Exp Identity Log Neg Reciprocal Sigmoid Sin Sqrt Tanh", smooth),
    "kinks": formula("Clip LeakyRelu Relu", lambda x: x.clamp(-0.3, 0.4) + F.leaky_relu(x, 0.2) + (x - 0.1).relu()),
    "arithmetic": formula(
        "Add Div Mul Pow Sub Where", lambda x: torch.where(x > 0, x, x**3) / (x.abs() + 1) - x * x[:, :1]
    ),
    "extremes": formula("Max Min", lambda x: torch.maximum(x, x * x) + torch.minimum(x.relu(), (-x).relu())),
    "reductions": formula(
        "ReduceL2 ReduceLogSumExp ReduceMean ReduceSum",
        lambda x: F.normalize(x) + x.mean(1, keepdim=True) + x.logsumexp(1)[:, None] + x.sum(1)[:, None],
    ),
    "softmax": formula("LogSoftmax Softmax", lambda x: x.softmax(1) + x.view(-1, 3, 4).log_softmax(1).flatten(1)),
    "moved": formula("Concat Expand Pad Reshape Slice Split Squeeze Tile Transpose Trilu Unsqueeze", moved),
    "chosen": formula("Gather GatherElements GatherND TopK", chosen),
    "put": formula("ScatterElements ScatterND", put),
    "along the batch": formula("Concat GatherND MatMul ReduceSum Slice Tile", along_the_batch),
    "dtypes": Case("Cast Gemm", lambda: net(nn.Linear(12, 9), nn.RMSNorm(9), shape=VECTOR), VECTOR),
    "small groups": Case(
        "ReduceMean Sqrt",
        lambda: net(nn.GroupNorm(4, 12), nn.Linear(12, 12), nn.GroupNorm(4, 12), nn.LayerNorm(12), shape=VECTOR),
        VECTOR,
    ),
    "images": Case(
        "Conv LayerNormalization MaxPool",
        lambda: net(nn.Conv2d(2, 3, 2), nn.LayerNorm([3, 10, 11]), nn.MaxPool2d(2)),
        IMAGE,
    ),
    "images, enlarged": Case(
        "ConvTranspose Resize",
        lambda: net(nn.ConvTranspose2d(2, 3, 3, 2), nn.Upsample(scale_factor=(0.5, 1.7), mode="bilinear")),
        IMAGE,
    ),
    "averages": Case(
        "Conv ReduceMean",
        lambda: net(nn.Conv1d(3, 4, 2), nn.AvgPool1d(3), nn.AvgPool1d(2, 1, 1, True, False), shape=SEQUENCE),
        SEQUENCE,
    ),
    "averages of images": Case(
        "Conv ReduceMean",
        lambda: net(nn.Conv2d(2, 4, (2, 1)), nn.AvgPool2d(2), nn.AvgPool2d((2, 3), (1, 2), 1, True, False)),
        IMAGE,
    ),
    "averages of volumes": Case(
        "Conv ReduceMean",
        lambda: net(
            nn.Conv3d(2, 2, (1, 1, 2)), nn.AvgPool3d(2), nn.AvgPool3d(2, 1, 1, divisor_override=3), shape=VOLUME
        ),
        VOLUME,
    ),
    "extrema along axes": formula(
        "ReduceMax ReduceMin ReduceProd",
        lambda x: x.amax(1)[:, None] * x.view(-1, 3, 4).amin((1, 2))[:, None] + x.view(-1, 4, 3).prod(1),
    ),
    "chosen extrema": formula(
        "GatherElements", lambda x: x.max(1, keepdim=True)[0] * x + x.view(-1, 3, 4).min(2)[0].repeat(1, 4)
    ),
    "cumulative sums": formula("CumSum", lambda x: x.cumsum(1) + x.flip(1).cumsum(0)),
    "curves": formula("Acos Acosh Asin Asinh Atan Atanh Cosh Sinh Tan", curves),
    "pooled rows": formula("DepthToSpace MaxPool ReduceMean", rows_of_pixels),
    "padded with copies": formula("Pad", padded),
    "convolved in a circle": Case(
        "Conv Pad",
        lambda: net(nn.Conv1d(3, 4, 3), nn.Conv1d(4, 3, 3, padding=1, padding_mode="circular"), shape=SEQUENCE),
        SEQUENCE,
    ),
    "pooled to any size": Case(
        "Gather MatMul MaxPool",
        lambda: Branches(
            nn.AdaptiveMaxPool2d(1), nn.AdaptiveMaxPool2d((4, 5)), nn.AdaptiveAvgPool2d((4, 5)), nn.MaxPool2d((9, 10))
        ),
        IMAGE,
    ),
    "volumes": Case(
        "Conv Gather MatMul MaxPool",
        lambda: Branches(
            nn.AdaptiveMaxPool3d((3, 4, 1)), nn.AdaptiveAvgPool3d((3, 4, 2)), nn.Conv3d(2, 3, 2), shape=VOLUME
        ),
        VOLUME,
    ),
    "extrema with ties": formula("ReduceMax ReduceMin", lambda x: x * x.relu().amax(1, keepdim=True) + tied(x)),
    "backwards": formula("Min Slice", lambda x: torch.minimum(x, x.flip(1))),
    "exponents": formula("Pow", lambda x: (x.abs() + 1) ** x + x.view(-1, 3, 4).norm(3, 1).repeat(1, 3)),
    "added up": formula("ScatterElements ScatterND", added_up),
    "detached": formula("Mul", lambda x: x * x.detach() + (x.round() - x).detach()),
    "sums of products": formula("Einsum", sums_of_products),
    "strided volumes": Case(
        "Conv", lambda: net(nn.Conv3d(2, 2, 1), nn.Conv3d(2, 2, 2, 2, groups=2), shape=VOLUME), VOLUME
    ),
    "transposed convolutions": Case(
        "ConvTranspose",
        lambda: net(nn.ConvTranspose2d(2, 4, 3), nn.ConvTranspose2d(4, 2, 3, 2, 1, 1, groups=2)),
        IMAGE,
    ),
    "both directions": Case("GRURecurrence LSTMRecurrence", lambda: Directions(), SEQUENCE),
    "gelu": formula("Erf Tanh", lambda x: F.gelu(x) + F.gelu(x, approximate="tanh")),
}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The operators whose rules were asked for a gradient."""
    operators: set[str] = set()

    def noting(rule: Any) -> Any:
        def note(graph: Any, node: NodeProto, gradients: Any) -> Any:
            operators.add(node.op_type)
            return rule(graph, node, gradients)

        return note

    for operator, rule in RULES.items():
        monkeypatch.setitem(RULES, operator, noting(rule))
    return operators


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_torch(name: str, tmp_path: Path, called: set[str]) -> None:
    case = CASES[name]
    torch.manual_seed(1)
    model = case.model()
    options = ExportConfig(name="test", input_shape=case.shape, input_dtype="float32", engines=ENGINES)
    bundle, verification = export_bundle(model, tmp_path / "bundle", options)
    assert set(case.operators.split()) <= called
    for engine in ENGINES:
        assert verification[engine].worst <= TOLERANCE
    for size in (1, 7):
        x, y = batch(case.shape, size)
        expected, found = gradient_of(model, x, y), run(bundle, x, y)["gradient"]
        assert relative_error(found, expected) <= 2e-6, size


NODES: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], torch.Tensor]]] = {
    # What torch.onnx writes otherwise.
    "Flatten": ({"axis": 1}, lambda x: x.flatten(1)),
    "GlobalAveragePool": ({}, lambda x: x.mean((2, 3))),
}


@pytest.mark.parametrize("operator", NODES)
def test_gradients_of_what_the_exporter_does_not_write(operator: str, tmp_path: Path) -> None:
    options, function = NODES[operator]
    shape = (3, 4, 2)
    generator = np.random.default_rng(0)
    weight, x = (generator.standard_normal((n, *shape), dtype=np.float32) for n in (1, 5))
    expected = torch.nn.Parameter(torch.from_numpy(weight).double())
    outputs = function(torch.from_numpy(x).double() * expected)
    y = generator.standard_normal(outputs.shape, dtype=np.float32)
    F.mse_loss(outputs, torch.from_numpy(y).double()).backward()
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * n) for name, n in (("x", 4), (OUTPUT, 2))]
    nodes = [
        helper.make_node("Mul", ["x", "weight"], ["scaled"], name="scale"),
        helper.make_node(operator, ["scaled"], ["result"], name=operator, **options),
        helper.make_node("Reshape", ["result", "shape"], [OUTPUT], name="rows"),
    ]
    constants = [
        numpy_helper.from_array(weight, "weight"),
        numpy_helper.from_array(np.array([-1, outputs.shape[1]]), "shape"),
    ]
    graph = helper.make_graph(nodes, "forward", ends[:1], ends[1:], constants)
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    trained = [TensorSpec(name="weight", shape=weight.shape, dtype="float32", layer="", part="other", role="shared")]
    shape = tuple(outputs.shape[1:])
    head = Head(ArraySpec(OUTPUT, shape, "float32"), ArraySpec(LABEL, shape, "float32"), find_loss("mse"))
    spec = StepSpec(trained, (head,), optimizer_constants("sgd"))
    write_steps(ForwardGraph(model, {}, {OUTPUT: shape}), tmp_path, spec, {INPUT: x})
    found = run_step(tmp_path / "train_step.onnx", x, y, weights=weight.ravel())["gradient"]
    np.testing.assert_allclose(found, expected.grad.numpy().ravel(), rtol=1e-5, atol=1e-7)


def test_every_operator_of_onnxruntime_training_has_a_rule_and_a_case() -> None:
    with_rule = ORT_TRAINING - WITHOUT_RULE.keys()
    assert with_rule <= RULES.keys()
    assert not WITHOUT_RULE.keys() & RULES.keys()
    assert with_rule <= {*NODES, *(name for case in CASES.values() for name in case.operators.split())}


def test_the_list_is_that_of_the_runtime() -> None:
    known = {model.graph.node[0].op_type for model in examples() if has_gradient(model)}
    assert known == ORT_TRAINING - WITHOUT_EXAMPLE.keys()


def examples() -> Iterator[onnx.ModelProto]:
    """Onnx's examples of operators of its own, from float32 to float32, followed by a mean."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some are of overflows
        cases = collect_testcases(None)
    for case in cases:
        graph = case.model.graph
        taken, given = ([v.name for v in values if is_float(v)] for values in (graph.input, graph.output))
        if len(graph.node) == 1 and graph.node[0].domain == "" and taken and given:
            model = onnx.ModelProto()
            model.CopyFrom(case.model)
            model.ir_version = IR_VERSION
            del model.opset_import[:]
            model.opset_import.append(helper.make_opsetid("", min(case.model.opset_import[0].version, 21)))
            model.graph.node.append(helper.make_node("ReduceMean", [given[0]], ["loss"], keepdims=0))
            model.graph.output.append(helper.make_tensor_value_info("loss", TensorProto.FLOAT, ()))
            yield model


def is_float(value: onnx.ValueInfoProto) -> bool:
    return value.type.tensor_type.elem_type == TensorProto.FLOAT


def has_gradient(model: onnx.ModelProto) -> bool:
    """Whether the runtime builds a gradient by the first input that has one."""
    options = SessionOptions()
    options.log_severity_level = 4
    first = next(value.name for value in model.graph.input if is_float(value))
    try:
        GradientGraphBuilder(model.SerializeToString(), {"loss"}, {first}, "loss", options).build()
    except (RuntimeError, Fail, InvalidArgument, InvalidGraph):
        return False
    return True
