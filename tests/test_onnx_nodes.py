"""ONNX's own examples of operators: each is computed and differentiated right, or refused for a reason on a list."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper
from onnx.backend.test.case.node import collect_testcases
from onnx.reference import ReferenceEvaluator
from step_models import run_step, write_rows

from export.forward.graph import IR_VERSION, OPSET
from export.forward.outputs import OUTPUT
from fedpara_edge.errors import InputError

WRITTEN_OTHERWISE, SELDOM = "torch.onnx or a translation writes other operators", "torch.onnx does not write it"
OF_TORCH_ONLY = "only what torch's own layer computes has a gradient"
NOT_BY_ONNXRUNTIME = "onnxruntime does not run some of the examples"
REFUSED = {
    "AveragePool": WRITTEN_OTHERWISE,
    "BatchNormalization": WRITTEN_OTHERWISE,
    "Bernoulli": "a number drawn by the runtime",
    "CenterCropPad": SELDOM,
    "Col2Im": SELDOM,
    "Compress": SELDOM,
    "ConvTranspose": "the padding is left to be computed",
    "DFT": SELDOM,
    "DequantizeLinear": SELDOM,
    "Det": SELDOM,
    "GRU": OF_TORCH_ONLY,
    "GridSample": SELDOM,
    "InstanceNormalization": WRITTEN_OTHERWISE,
    "LRN": WRITTEN_OTHERWISE,
    "LSTM": OF_TORCH_ONLY,
    "LpNormalization": WRITTEN_OTHERWISE,
    "LpPool": WRITTEN_OTHERWISE,
    "MaxUnpool": SELDOM,
    "Mean": "of a single input, which stands for torch's detach",
    "Mod": NOT_BY_ONNXRUNTIME,
    "NegativeLogLikelihoodLoss": "losses come with their gradient",
    "OneHot": "its values are seldom trained",
    "OptionalGetElement": SELDOM,
    "Pow": NOT_BY_ONNXRUNTIME,
    "RNN": OF_TORCH_ONLY,
    "Resize": NOT_BY_ONNXRUNTIME + ", and regions have no rule",
    "ReverseSequence": SELDOM,
    "RoiAlign": SELDOM,
    "STFT": SELDOM,
    "Scan": SELDOM,
    "ScatterElements": "only without a reduction, or with addition",
    "ScatterND": "only without a reduction, or with addition",
    "SoftmaxCrossEntropyLoss": "losses come with their gradient",
    "Unique": SELDOM,
}
"""Reason why some examples of an operator are refused."""
NOT_COMPARED = {
    "DequantizeLinear": "ONNX's reference lacks that of opset 18",
    "Dropout": "entries are drawn: `test_training_step`",
    "Erf": "ONNX's reference rounds to single precision",
    "test_resize_downsample_scales_linear_align_corners": "onnxruntime's result is another",
    "test_resize_downsample_scales_cubic_align_corners": "onnxruntime's result is another",
}
"""Reason why examples, by operator or name, are written but not compared."""


@dataclass(frozen=True)
class Example:
    """Node, the arrays that it takes, the name of its first output, float32, and its size."""

    node: NodeProto
    inputs: dict[str, np.ndarray]
    output: str
    entries: int

    @property
    def trained(self) -> list[str]:
        """Names of the float32 inputs, all of which are trained if possible."""
        return [name for name, array in self.inputs.items() if is_data(self.node, name, array) and array.size]

    def value(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Output in double precision."""
        ends = [[helper.make_empty_tensor_value_info(name) for name in names] for names in (inputs, [self.output])]
        graph = helper.make_graph([self.node], "node", *ends)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        doubled = {n: a.astype(float) if a.dtype == np.float32 else a for n, a in inputs.items()}
        return np.asarray(ReferenceEvaluator(model).run(None, doubled)[0], float)


def examples() -> Iterator[tuple[str, Example]]:
    """Examples of single operators of opset 18 that lead from float32 to float32."""
    generator = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some are of overflows
        cases = collect_testcases(None)
    for case in cases:
        graph = case.model.graph
        if len(graph.node) > 1 or not all(v.type.HasField("tensor_type") for v in (*graph.input, *graph.output)):
            continue
        if not is_float(graph.output[0]) or not any(map(is_float, graph.input)) or not is_of_opset(case.model):
            continue
        inputs, outputs = case.data_sets[0]
        node = NodeProto()
        node.CopyFrom(graph.node[0])
        node.name = "node"
        node.input[:] = [name and f"in.{name}" for name in node.input]
        node.output[:] = [name and f"out.{name}" for name in node.output]
        arrays = {f"in.{v.name}": np.asarray(array) for v, array in zip(graph.input, inputs, strict=True)}
        for name, array in arrays.items():
            if is_data(node, name, array):  # without ties and kinks, where gradients are a convention
                arrays[name] = (array + 1e-3 * generator.random(array.shape)).astype(np.float32)
        example = Example(node, arrays, f"out.{graph.output[0].name}", np.asarray(outputs[0]).size)
        if example.trained and example.entries:
            yield case.name, example


def is_data(node: NodeProto, name: str, array: np.ndarray) -> bool:
    return array.dtype == np.float32 and array.ndim > 0 and (node.op_type != "Resize" or name == node.input[0])


def is_float(value: onnx.ValueInfoProto) -> bool:
    return value.type.tensor_type.elem_type == TensorProto.FLOAT


def is_of_opset(model: onnx.ModelProto) -> bool:
    older = onnx.ModelProto()
    older.CopyFrom(model)
    del older.opset_import[:]
    older.opset_import.append(helper.make_opsetid("", OPSET))
    older.ir_version = IR_VERSION
    try:
        onnx.checker.check_model(older, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return False
    return True


def write(example: Example, trained: list[str], folder: Path) -> None:
    """Write the steps of the model x [B, 1] · the flattened output, with the inputs as initializers."""
    nodes = [
        example.node,
        helper.make_node("Reshape", [example.output, "one row"], ["row"], name="row"),
        helper.make_node("Mul", ["x", "row"], [OUTPUT], name="scale"),
    ]
    arrays = {**example.inputs, "one row": np.array([1, -1])}
    write_rows(nodes, arrays, trained, example.entries, folder, np.ones((3, 1), np.float32))


def refusal_of(example: Example, folder: Path, *, comparing: bool) -> str:
    """Compare loss and gradient with ONNX's reference in double precision; return why the example is refused, or ""."""
    generator, refusal = np.random.default_rng(0), ""
    for trained in (example.trained, example.trained[:1]):
        try:
            write(example, trained, folder)
            break
        except InputError as error:
            refusal = refusal or str(error)
    else:
        return refusal
    if not comparing:
        return ""
    output = example.value(example.inputs).ravel()
    x = generator.uniform(0.5, 1, (2, 1)).astype(np.float32)
    y = (x * output * generator.random((2, len(output)))).astype(np.float32)
    weights = np.concatenate([example.inputs[name].ravel() for name in trained])
    found = run_step(folder / "train_step.onnx", x, y, weights=weights)
    difference = x.astype(float) * output - y
    np.testing.assert_allclose(found["loss"], np.mean(difference**2), rtol=1e-4)
    by_output = (2 / difference.size * x * difference).sum(0)
    moves = {name: generator.standard_normal(example.inputs[name].shape) for name in trained}
    ends = [
        example.value(example.inputs | {name: example.inputs[name] + step * move for name, move in moves.items()})
        for step in (1e-6, -1e-6)
    ]
    slope = float((ends[0] - ends[1]).ravel() @ by_output) / 2e-6
    along = float(found["gradient"].astype(float) @ np.concatenate([move.ravel() for move in moves.values()]))
    assert abs(along - slope) <= 2e-4 * (np.linalg.norm(found["gradient"]) + abs(slope)), (along, slope)
    return ""


EXAMPLES = dict(examples())


@pytest.mark.parametrize("operator", sorted({example.node.op_type for example in EXAMPLES.values()}))
def test_gradients_are_right_or_refused(operator: str, tmp_path: Path) -> None:
    refusals = []
    for name, example in EXAMPLES.items():
        if example.node.op_type == operator:
            refusals.append(refusal_of(example, tmp_path, comparing=not NOT_COMPARED.keys() & {name, operator}))
    assert any(refusals) == (operator in REFUSED), refusals
    for refusal in filter(None, refusals):
        assert operator in refusal or "that onnxruntime runs" in refusal or "found that it does not" in refusal


def test_most_examples_are_right() -> None:
    refused = [example for example in EXAMPLES.values() if example.node.op_type in REFUSED]
    assert len(EXAMPLES) > 600
    assert len(refused) < len(EXAMPLES) / 2
    assert REFUSED.keys() | NOT_COMPARED.keys() <= {*EXAMPLES, *(e.node.op_type for e in EXAMPLES.values())}
