"""Predictions of folded models, and what they say of themselves; `fold` and `predict` as a user meets them."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command_line import Bad, Command, check_refused, succeed
from onnx import TensorProto, helper, numpy_helper

from device_runtime.prediction import Predictor
from fedpara_edge.demo import IMAGES
from fedpara_edge.errors import DivergedError, FedparaError, InputError
from fedpara_edge.formats.accuracy import count_correct, predicted
from fedpara_edge.formats.folded import METADATA_KEY, FoldedSpec, read_folded
from fedpara_edge.formats.interface import ArraySpec, Head, Interface
from fedpara_edge.losses import find_loss

INTERFACE = Interface(
    inputs=(ArraySpec("x", (4,), "float32"),),
    heads=(Head(ArraySpec("logits", (3,), "float32"), ArraySpec("y", (), "int64", 3), find_loss("cross_entropy")),),
)
SPEC = FoldedSpec(
    model="linear",
    fingerprint="f" * 64,
    round=3,
    precision="float32",
    personal=False,
    interface=INTERFACE,
)
WEIGHT = np.random.default_rng(0).standard_normal((4, 3), np.float32)


def linear_model(spec: FoldedSpec | None = SPEC, *, metadata: dict[str, str] | None = None) -> onnx.ModelProto:
    """A folded model of one product, x W; with tokens, the sum of the rows of W that they name."""
    tokens = spec is not None and spec.interface.inputs[0].dtype == "int64"
    nodes = [helper.make_node("MatMul", ["x", "w"], ["logits"])]
    constants = [numpy_helper.from_array(WEIGHT, "w")]
    if tokens:
        nodes = [
            helper.make_node("Gather", ["w", "x"], ["rows"]),
            helper.make_node("ReduceSum", ["rows", "axis"], ["logits"], keepdims=0),
        ]
        constants.append(numpy_helper.from_array(np.array([1]), "axis"))
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.INT64 if tokens else TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    entries = {} if spec is None else {METADATA_KEY: spec.to_json()}
    helper.set_model_props(model, entries | (metadata or {}))
    return model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(linear_model(metadata={"another": "entry"}), path)
    return path


def taking(spec: ArraySpec) -> FoldedSpec:
    return replace(SPEC, interface=replace(INTERFACE, inputs=(spec,)))


def test_batches_do_not_matter(model: Path) -> None:
    x = np.random.default_rng(1).standard_normal((23, 4), np.float32)
    predictor = Predictor(model, threads=1)
    for batch_size in (1, 7, 23, 100):
        np.testing.assert_allclose(predictor.predict(x, batch_size)["logits"], x @ WEIGHT, rtol=1e-5)
    assert predictor.predict(x)["logits"].dtype == np.float32


def test_tokens_may_be_any_integers(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(linear_model(taking(ArraySpec("x", (4,), "int64", 4))), path)
    x = np.array([[0, 1, 2, 3], [3, 3, 0, 0]], np.uint8)
    np.testing.assert_allclose(Predictor(path).predict(x)["logits"], WEIGHT[x].sum(axis=1), rtol=1e-5)
    with pytest.raises(InputError, match=r"row 1: expected integers in \[0, 4\), found 4"):
        Predictor(path).predict(np.array([[0, 1, 2, 3], [4, 3, 0, 0]]))


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.zeros((2, 5), np.float32), r"array 'x': expected shape \[N, 4\], found \[2, 5\]"),
        (np.zeros(4, np.float32), r"expected shape \[N, 4\], found \[4\]"),
        (np.zeros((2, 4)), "expected float32, found float64"),
        (np.zeros((2, 4), np.uint8), "expected float32, found uint8"),
        (np.zeros((0, 4), np.float32), "expected at least one row, found none"),
        (np.full((2, 4), np.nan, np.float32), "row 0: expected finite numbers, found nan"),
    ],
)
def test_inputs_that_do_not_fit(x: Any, words: str, model: Path) -> None:
    with pytest.raises(InputError, match=words) as caught:
        Predictor(model).predict(x)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("threads", 0), ("threads", 5000)])
def test_numbers_out_of_range(name: str, value: int, model: Path) -> None:
    x = np.zeros((2, 4), np.float32)
    with pytest.raises(InputError, match=rf"{name}: expected an integer .*, found {value}"):
        Predictor(model, threads=value) if name == "threads" else Predictor(model).predict(x, value)


def test_a_failing_runtime_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(linear_model(taking(ArraySpec("x", (5,), "float32"))), path)
    with pytest.raises(
        FedparaError, match=r"rows 0 to 1: expected to run them, found .*Got invalid dimensions"
    ) as caught:
        Predictor(path).predict(np.zeros((2, 5), np.float32))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("precision", "remedy"),
    [
        ("float32", "check the input, or fold weights of an earlier round"),
        ("float16", "--precision float32, as float16"),
    ],
)
def test_outputs_that_are_not_finite_are_refused(precision: Any, remedy: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(linear_model(replace(SPEC, precision=precision)), path)
    x = np.ones((5, 4), np.float32)
    x[3] = np.copysign(3e38, WEIGHT[:, 0])
    for batch_size in (1, 2, 256):
        with pytest.raises(DivergedError, match=rf"row 3: expected finite outputs, found NaN or Inf; .*{remedy}"):
            Predictor(path).predict(x, batch_size)


def test_a_model_that_onnxruntime_refuses_is_one_line(tmp_path: Path) -> None:
    path, broken = tmp_path / "model.onnx", linear_model()
    broken.graph.node[0].op_type = "MatMool"
    onnx.save(broken, path)
    with pytest.raises(
        InputError, match=r"expected a model that onnxruntime loads, found .*MatMool.*; fold it again"
    ) as e:
        Predictor(path)
    assert "\n" not in str(e.value)


def test_the_entry_is_canonical_json() -> None:
    assert SPEC.to_json() == (
        '{"fingerprint":"' + "f" * 64 + '","format":"fedpara-edge/folded",'
        '"input":{"classes":null,"dtype":"float32","name":"x","shape":[4]},'
        '"label":{"classes":3,"dtype":"int64","name":"y","shape":[]},"loss":"cross_entropy","model":"linear",'
        '"output":{"classes":null,"dtype":"float32","name":"logits","shape":[3]},'
        '"personal":false,"precision":"float32","round":3,"version":1}'
    )
    assert FoldedSpec.from_json(SPEC.to_json()) == SPEC


def test_the_entry_is_read_from_golden_bytes(tmp_path: Path) -> None:
    path, value = tmp_path / "model.onnx", SPEC.to_json().encode()
    entry = b"\x0a\x0cfedpara_edge" + b"\x12" + bytes([len(value) & 127 | 128, len(value) >> 7]) + value
    length = bytes([len(entry) & 127 | 128, len(entry) >> 7])
    path.write_bytes(b"\x08\x0a" + b"\x3a\x03\x12\x01g" + b"\x72" + length + entry + b"\x32\x02hi")
    assert read_folded(path)[0] == SPEC


def test_the_entry_is_read_wherever_it_stands(model: Path) -> None:
    assert read_folded(model)[0] == SPEC


def test_damaged_files_are_refused_in_one_line(model: Path, tmp_path: Path) -> None:
    content, path = model.read_bytes(), tmp_path / "damaged.onnx"
    refused: list[str] = []
    random = np.random.default_rng(0)
    spoiled = [content[:size] for size in range(0, len(content), 7)]
    for _ in range(300):
        damaged = bytearray(content)
        damaged[random.integers(len(content))] = random.integers(256)
        spoiled.append(bytes(damaged))
    for damaged in spoiled:
        path.write_bytes(damaged)
        try:
            read_folded(path)
        except InputError as error:
            refused.append(str(error))
    assert len(refused) > len(content) // 14
    assert not any("\n" in message for message in refused)
    assert all(message.endswith("use a model written by fedpara-edge fold") for message in refused)


def spoil(**fields: Any) -> str:
    return json.dumps({**json.loads(SPEC.to_json()), **fields})


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (None, "no entry 'fedpara_edge'"),
        ("{", "Expecting"),
        ("[]", "another format"),
        (spoil(version=3), "another format"),
        (spoil(version=2), "other fields"),
        (spoil(format="fedpara-edge/weights"), "another format"),
        (spoil(more=1), "other fields"),
        (spoil(input=3), "other fields"),
        (spoil(input={"name": "x", "shape": [4], "dtype": "object"}), "an array of object"),
        (spoil(input={"name": "x", "shape": [-4], "dtype": "uint8"}), r"an array of uint8 \[-4\]"),
        (spoil(round="3"), "other values"),
        (spoil(loss="hinge"), "other fields .*expected one of cross_entropy, .* found 'hinge'"),
        (spoil(precision=8), "other values"),
        ("[" * 100_000, "nested too deeply"),
        (" " * (1 << 20), "an entry of 1048"),
    ],
)
def test_foreign_entries_are_refused(entry: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(linear_model(None, metadata={} if entry is None else {METADATA_KEY: entry}), path)
    with pytest.raises(InputError, match=words):
        Predictor(path)


def test_labels_that_outputs_stand_for() -> None:
    outputs = np.array([[0.5, -1.0], [0.0, 2.0]], np.float32)
    assert predicted(find_loss("cross_entropy"), outputs).tolist() == [0, 1]  # type: ignore[union-attr]
    assert predicted(find_loss("bce"), outputs).tolist() == [[1, 0], [0, 1]]  # type: ignore[union-attr]
    assert predicted(find_loss("mse"), outputs) is None
    assert count_correct(find_loss("cross_entropy"), outputs, np.array([0, 0])) == 1
    assert count_correct(find_loss("bce"), outputs, np.array([[1.0, 0.4], [0.6, 1.0]])) == 3
    assert count_correct(find_loss("mse"), outputs, outputs) == 0


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a personal bundle that a device has trained on it (weights and state), and another."""
    folder = tmp_path_factory.mktemp("material")
    with np.load(IMAGES) as data:
        np.savez(folder / "train.npz", x=data["x_train"][:1000], y=data["y_train"][:1000])
        np.savez(folder / "test.npz", x=data["x_test"][:500], y=data["y_test"][:500])
        np.savez(folder / "unlabelled.npz", x=data["x_test"][:500])
    succeed(
        folder,
        ("export", "mlp", "--kind", "pfedpara", "--gamma", "0.3", "-o", "bundle"),
        ("export", "mlp", "--kind", "dense", "--engines", "onnxruntime", "-o", "other"),
        ("train", "bundle", "--data", "train.npz", "--state", "state", "--lr", "0.1", "-o", "update.safetensors"),
        ("aggregate", "update.safetensors", "--weights", "bundle/weights.safetensors", "-o", "round-1.safetensors"),
    )
    return folder


@pytest.fixture
def here(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, with links to the material."""
    folder = tmp_path / "here"
    folder.mkdir()
    for path in material.iterdir():
        (folder / path.name).symlink_to(path)
    monkeypatch.chdir(folder)
    return folder


FOLD = ("fold", "bundle", "--weights", "round-1.safetensors", "-o", "model.onnx")


@pytest.mark.slow
def test_fold_predict_and_inspect(run: Command, here: Path) -> None:
    folded = run(*FOLD, "--state", "state", "--data", "test.npz", "--json")
    assert folded.code == 0, folded.err
    assert (folded.json["round"], folded.json["precision"], folded.json["personal"]) == (1, "float32", True)
    assert folded.json["layers"] == ["hidden", "head"]
    assert folded.json["bytes"] == (here / "model.onnx").stat().st_size
    assert folded.json["error"] < 1e-5
    evaluated = run(
        "evaluate", "bundle", "--weights", "round-1.safetensors", "--state", "state", "--data", "test.npz", "--json"
    ).json
    accuracy = evaluated["accuracy"]
    assert (folded.json["accuracy"], folded.json["factored_accuracy"]) == (accuracy, accuracy)
    labelled = run("predict", "model.onnx", "--data", "test.npz", "-o", "labelled.npz", "--json")
    assert labelled.json["labels"]["y"]["accuracy"] == accuracy
    assert {**labelled.json, "labels": None} == {
        "predictions": "labelled.npz",
        "examples": 500,
        "accuracy": accuracy,
        "labels": None,
    }
    unlabelled = run("predict", "model.onnx", "--data", "unlabelled.npz", "-o", "unlabelled-p.npz", "--batch-size", "7")
    assert unlabelled.out == "unlabelled-p.npz: 500 examples\n"
    with np.load("labelled.npz") as one, np.load("unlabelled-p.npz") as other, np.load("test.npz") as data:
        np.testing.assert_allclose(one["logits"], other["logits"], atol=1e-5)
        assert one["predicted"].dtype == np.int64
        assert (one["predicted"] == data["y"]).mean() == accuracy
    shown = run("inspect", "model.onnx", "--json").json
    assert (shown["format"], shown["model"], shown["round"]) == ("fedpara-edge/folded", "mlp", 1)
    assert run("inspect", "model.onnx").out.startswith("model.onnx: fedpara-edge/folded\n")


def test_personal_tensors_of_the_state_or_as_exported(run: Command, here: Path) -> None:
    text = run(*FOLD).out
    assert "2 layers composed, float32" in text
    assert "with the personal tensors as exported; pass --state for a device's own" in text
    exported = (here / "model.onnx").read_bytes()
    assert "as exported" not in run(*FOLD, "--state", "state", "--overwrite").out
    assert (here / "model.onnx").read_bytes() != exported


def test_smaller_precisions_report_their_accuracy(run: Command, here: Path) -> None:
    sizes = []
    for precision in ("float32", "float16", "int8"):
        ended = run(*FOLD, "--state", "state", "--data", "test.npz", "--precision", precision, "--overwrite", "--json")
        assert ended.code == 0, ended.err
        assert ended.err == ""
        sizes.append((here / "model.onnx").stat().st_size)
        predictions = run("predict", "model.onnx", "--data", "test.npz", "-o", "p.npz", "--overwrite", "--json").json
        assert predictions["accuracy"] == pytest.approx(ended.json["accuracy"], abs=5e-3)
    assert sizes[1] < 0.55 * sizes[0]
    assert sizes[2] < 0.3 * sizes[0]


def save(**arrays: Any) -> Callable[[Path], None]:
    return lambda here: np.savez(here / "bad.npz", **arrays)


def place_model(here: Path) -> None:
    onnx.save(linear_model(), here / "model.onnx")


def save_with_model(**arrays: Any) -> Callable[[Path], None]:
    def prepare(here: Path) -> None:
        place_model(here)
        np.savez(here / "bad.npz", **arrays)

    return prepare


X = np.zeros((4, 1, 28, 28), np.uint8)
PREDICT = ("predict", "model.onnx", "-o", "p.npz", "--data")
BAD: dict[str, Bad] = {
    "missing bundle": (None, ("fold", "nowhere", "-o", "model.onnx"), 2, "nowhere"),
    "missing weights": (None, ("fold", "bundle", "--weights", "nowhere", "-o", "model.onnx"), 2, "nowhere"),
    "weights of another bundle": (
        None,
        ("fold", "other", "--weights", "round-1.safetensors", "-o", "model.onnx"),
        6,
        "expected weights of bundle",
    ),
    "state of another bundle": (None, ("fold", "other", "--state", "state", "-o", "model.onnx"), 6, "state"),
    "missing state": (None, (*FOLD, "--state", "nowhere"), 2, "nowhere"),
    "unknown precision": (None, (*FOLD, "--precision", "int2"), 2, "int2"),
    "data that do not fit": (save(x=X[:, 0], y=np.zeros(4, int)), (*FOLD, "--data", "bad.npz"), 2, "bad.npz"),
    "data without labels": (None, (*FOLD, "--data", "unlabelled.npz"), 2, "expected arrays named 'x' and 'y'"),
    "impossible drop": (None, (*FOLD, "--max-drop", "-1"), 2, "max_drop"),
    "folder for a model": (None, ("fold", "bundle", "-o", "state", "--overwrite"), 2, "expected a file"),
    "outputs that are not finite": (
        save_with_model(x=np.full((2, 4), 3e38, np.float32)),
        (*PREDICT, "bad.npz"),
        1,
        "row 0: expected finite outputs",
    ),
    "existing model": (place_model, FOLD, 7, "--overwrite"),
    "missing model": (None, (*PREDICT, "test.npz"), 2, "model.onnx: expected a folded model, found No such file"),
    "no folded model": (
        None,
        ("predict", "bundle/training_model.onnx", "--data", "test.npz", "-o", "p.npz"),
        2,
        "training_model.onnx: expected a folded model, found no entry",
    ),
    "data of another model": (place_model, (*PREDICT, "test.npz"), 2, r"expected shape \[N, 4\]"),
    "no inputs": (
        save_with_model(y=np.zeros(4, int)),
        (*PREDICT, "bad.npz"),
        2,
        "expected arrays named 'x', f",
    ),
    "labels that do not fit": (
        save_with_model(x=np.zeros((4, 4), np.float32), y=np.full(4, 3)),
        (*PREDICT, "bad.npz"),
        2,
        r"'y', row 0: expected integers in \[0, 3\)",
    ),
    "inspect a foreign model": (None, ("inspect", "bundle/eval_model.onnx"), 2, "eval_model.onnx"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_a_code_and_writes_nothing(name: str, run: Command, here: Path) -> None:
    check_refused(run, here, BAD[name])


def test_predicting_needs_neither_torch_nor_onnx(model: Path) -> None:
    code = (
        "import sys, numpy\nfrom pathlib import Path\nfrom device_runtime.prediction import Predictor\n"
        f"Predictor(Path({str(model)!r})).predict(numpy.zeros((2, 4), numpy.float32))\n"
        "heavy = {'torch', 'onnx'} & sys.modules.keys()\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
