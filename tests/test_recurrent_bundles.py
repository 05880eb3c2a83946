"""LSTM and GRU made of factors in bundles: both engines train them as torch does, folded models have them composed."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from command_line import Command
from norms import relative_error
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime import InferenceSession
from recurrent_models import PAIRS, Tagger
from small_net import without_verification
from torch import nn
from torch.nn import functional as F

from device_runtime import open_engine
from device_runtime.engines.registry import ENGINES
from export import export_bundle
from export.comparison import TOLERANCE
from export.folding.fold import fold
from fedpara_edge.factors.layout import Kind
from fedpara_edge.formats.bundle import WEIGHTS, Bundle
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.formats.weights import read_weights

torch.set_num_threads(1)  # the tensors are too small for threads to pay

STEPS, RATE = 20, 0.5
SHAPE = (6, 3)
ORDERS = {"lstm": "ifgo", "gru": "rzn"}, {"lstm": "iofg", "gru": "zrn"}  # torch's, and ONNX's


def small_bundle(model: nn.Module, folder: Path, engines: tuple[str, ...] = tuple(ENGINES)) -> Bundle:
    with without_verification():
        options = ExportConfig(name="tagger", input_shape=SHAPE, input_dtype="float32", engines=engines)
        return export_bundle(model, folder, options)[0]


def tagger(pair: str, **options: Any) -> Tagger:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"num_layers": 2, "batch_first": True, "rank": 2, **options}
    return Tagger(PAIRS[pair][0](3, 8, **settings), 16 if options.get("bidirectional") else 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pair", "options"),
    [
        ("lstm", {"dropout": 0.5}),
        ("lstm", {"kind": "lowrank", "num_layers": 1, "bias": False}),
        ("gru", {"tanh": True, "dropout": 0.5}),
    ],
)
def test_both_engines_agree_with_torch(pair: str, options: dict[str, Any], tmp_path: Path) -> None:
    chosen = ExportConfig(name="tagger", input_shape=SHAPE, input_dtype="float32")
    bundle, verification = export_bundle(tagger(pair, **options), tmp_path / "bundle", chosen)
    assert verification.keys() == ENGINES.keys()
    assert max(errors.worst for errors in verification.values()) <= TOLERANCE
    (label,) = bundle.interface.labels
    assert (label.shape, label.dtype, label.classes) == ((6,), "int64", 5)
    assert bundle.interface.outputs[0].shape == (5, 6)
    graph = onnx.load(bundle.file("eval_model.onnx")).graph
    operators = [node.op_type for node in graph.node]
    assert operators.count(pair.upper()) == options.get("num_layers", 2)
    for names in ({tensor.name for tensor in graph.initializer}, set(operators)):
        assert not names & {"memory.weight_ih_l0", "Scan"}


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["lstm", "gru"])
def test_both_directions_train_in_both_engines(pair: str, tmp_path: Path) -> None:
    model = tagger(pair, bidirectional=True, num_layers=1)
    config = ExportConfig(name="tagger", input_shape=SHAPE, input_dtype="float32", engines=tuple(ENGINES))
    _, verification = export_bundle(model, tmp_path / "bundle", config)
    assert [verification[engine].worst <= TOLERANCE for engine in ENGINES] == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize(("pair", "kind"), [("lstm", "fedpara"), ("gru", "pfedpara")])
def test_twenty_steps_agree_with_torch(pair: str, kind: Kind, tmp_path: Path) -> None:
    model = tagger(pair, kind=kind)
    bundle = small_bundle(model, tmp_path / "bundle")
    engines = [open_engine(bundle, name, threads=1) for name in ENGINES]
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    generator = np.random.default_rng(0)
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for number in range(STEPS):
        rows = (16, 7)[number % 2]
        x = generator.standard_normal((rows, *SHAPE), dtype=np.float32)
        y = (x.cumsum(axis=1).sum(axis=2) > 0).astype(np.int64) + 2 * (x[..., 0] > 0)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y))
        loss.backward()
        optimizer.step()
        for engine in engines:
            found = engine.step(x, y, learning_rate=RATE, seed=0, micro_batches=1 + number % 3)
            assert found == pytest.approx(loss.item(), rel=1e-5), engine.name
    for engine in engines:
        for name, tensor in engine.read().items():
            move = model.state_dict()[name] - initial[name]
            error = torch.from_numpy(tensor) - model.state_dict()[name]
            assert error.norm() < 1e-4 * move.norm(), (engine.name, name)


def folded_outputs(path: Path, x: NDArray[Any]) -> NDArray[Any]:
    outputs: NDArray[Any] = InferenceSession(path, providers=["CPUExecutionProvider"]).run(["logits"], {"x": x})[0]
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pair", "options", "engine"),
    [
        ("lstm", {"bidirectional": True}, "onnxruntime"),
        ("lstm", {"kind": "pfedpara", "bias": False, "dropout": 0.5}, "ort-training"),
        ("gru", {"tanh": True}, "onnxruntime"),
    ],
)
def test_folded_the_weights_are_composed(pair: str, options: dict[str, Any], engine: str, tmp_path: Path) -> None:
    model = tagger(pair, **options).eval()
    bundle = small_bundle(model, tmp_path / "bundle", (engine,))
    x = np.random.default_rng(0).standard_normal((3, *SHAPE), np.float32)
    expected = model(torch.from_numpy(x)).detach().numpy()
    sizes = []
    for precision, tolerance in (("float32", 1e-5), ("float16", 2e-3), ("int8", 0.05)):
        path = tmp_path / f"{precision}.onnx"
        result = fold(bundle, read_weights(bundle.file(WEIGHTS)), path, precision=precision)  # type: ignore[arg-type]
        assert result.layers == tuple(f"memory.{name}" for name in model.memory.weights())
        assert relative_error(folded_outputs(path, x), expected) <= tolerance, precision
        sizes.append(sum(weight.size * weight.itemsize for weight in gates(path).values()))
        assert {node.domain for node in onnx.load(path).graph.node} == {""}
    assert all(larger > 1.8 * smaller for larger, smaller in pairwise(sizes))
    names = list(model.memory.weights())
    directions = 2 if options.get("bidirectional") else 1
    found = gates(tmp_path / "float32.onnx")
    starts = [name for name in names if not name.endswith("_reverse")]
    assert found.keys() == {f"memory.{name}.weight.gates" for name in starts}
    for name in starts:
        composed = [model.memory.get_submodule(f"{name}{end}")() for end in ("", "_reverse")[:directions]]
        torchs, onnxs = (orders[pair] for orders in ORDERS)
        blocks = [dict(zip(torchs, weight.detach().chunk(len(torchs)), strict=True)) for weight in composed]
        wanted = torch.stack([torch.cat([of_gate[gate] for gate in onnxs]) for of_gate in blocks])
        np.testing.assert_allclose(found[f"memory.{name}.weight.gates"], wanted.numpy(), rtol=1e-5, atol=1e-8)


def gates(path: Path) -> dict[str, NDArray[Any]]:
    """The weights of recurrent operators as they are stored."""
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    return {name: value for name, value in tensors.items() if ".gates" in name and value.ndim == 3}


def test_dense_layers_of_torch_fold_as_they_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tagger(nn.LSTM(3, 8, batch_first=True), 8)
    bundle = small_bundle(model, tmp_path / "bundle", ("onnxruntime",))
    result = fold(bundle, read_weights(bundle.file(WEIGHTS)), tmp_path / "model.onnx")
    assert result.layers == ()
    x = np.random.default_rng(0).standard_normal((3, *SHAPE), np.float32)
    expected = model(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(folded_outputs(tmp_path / "model.onnx", x), expected, atol=1e-6)


@pytest.mark.slow
def test_a_round_of_characters(run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and labels at every position, through the commands a user types."""
    monkeypatch.chdir(tmp_path)
    text = np.tile(np.array([0, 1, 2, 3, 3, 2, 1, 0]), 8)
    windows = np.stack([text[start : start + 13] for start in range(40)])
    np.savez("data.npz", x=windows[:, :-1].astype(np.uint8), y=windows[:, 1:].astype(np.int64))
    made = run(
        "export", "char-lstm", "--classes", 4, "--input-shape", 12, "--gamma", 0, "--engines", "onnxruntime", "-o", "b"
    )
    assert made.code == 0, made.err
    assert "lstm.weight_hh_l1: fedpara R=16, 262,144 -> 40,960 entries" in made.out
    shown = run("inspect", "b", "--json").json
    assert (shown["input"]["classes"], shown["label"]["shape"]) == (4, [12])
    train = ("train", "b", "--data", "data.npz", "--batch-size", 8, "--lr", 1)
    for client in ("one", "two"):
        ended = run(*train, "--client", client, "--seed", len(client), "--state", client, "-o", f"{client}.safetensors")
        assert ended.code == 0, ended.err
    ended = run(
        "aggregate", "one.safetensors", "two.safetensors", "--weights", "b/weights.safetensors", "-o", "1.safetensors"
    )
    assert ended.code == 0, ended.err
    judged = run("evaluate", "b", "--weights", "1.safetensors", "--data", "data.npz", "--json").json
    assert judged["examples"] == 40
    assert 0.2 < judged["accuracy"] < 1
    folded = run("fold", "b", "--weights", "1.safetensors", "--data", "data.npz", "-o", "model.onnx", "--json")
    assert folded.code == 0, folded.err
    assert folded.json["accuracy"] == pytest.approx(judged["accuracy"], abs=0.01)
    predicted = run("predict", "model.onnx", "--data", "data.npz", "-o", "p.npz", "--json")
    assert predicted.json["accuracy"] == pytest.approx(folded.json["accuracy"])
    assert np.load("p.npz")["predicted"].shape == (40, 12)
