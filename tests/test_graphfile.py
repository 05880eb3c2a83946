"""Graph files from elsewhere: what reaches beyond the file is refused before a runtime sees it."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import Command
from onnx import TensorProto, helper
from small_net import SmallBundle

from export.folding.fold import fold
from fedpara_edge.errors import FedparaError
from fedpara_edge.formats.bundle import MANIFEST, WEIGHTS, open_bundle, write_manifest
from fedpara_edge.formats.graphfile import MAX_DEPTH, check_graph
from fedpara_edge.formats.weights import read_weights
from fedpara_edge.storage.protobuf import fields

Spoil = Callable[[onnx.ModelProto], None]


def identity(name: str = "g") -> onnx.GraphProto:
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    constant = helper.make_tensor("c", TensorProto.FLOAT, [1], [1.0])
    return helper.make_graph([helper.make_node("Identity", ["c"], ["y"])], name, [], [y], [constant])


def model() -> onnx.ModelProto:
    return helper.make_model(identity(), opset_imports=[helper.make_opsetid("", 18)])


def external(tensor: TensorProto, location: str = "/etc/passwd") -> TensorProto:
    tensor.ClearField("raw_data")
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    return tensor


def external_graph() -> onnx.GraphProto:
    graph = identity()
    external(graph.initializer[0])
    return graph


def nested(depth: int) -> onnx.GraphProto:
    graph = identity()
    for _ in range(depth):
        outer = identity()
        outer.node.append(helper.make_node("If", ["c"], ["z"], then_branch=graph, else_branch=identity()))
        graph = outer
    return graph


def node(kind: str, *, domain: str = "", **attributes: object) -> Spoil:
    return lambda model: model.graph.node.append(helper.make_node(kind, ["c"], ["z"], domain=domain, **attributes))


def located_only(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL


def sparse(model: onnx.ModelProto) -> None:
    values, indices = (helper.make_tensor(n, k, [1], [1]) for n, k in (("s", 1), ("i", TensorProto.INT64)))
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [3]))


def function(model: onnx.ModelProto) -> None:
    inner = helper.make_node("Identity", ["a"], ["b"])
    model.functions.append(helper.make_function("", "F", ["a"], ["b"], [inner], [helper.make_opsetid("", 18)]))


HOSTILE: dict[str, tuple[Spoil, str]] = {
    "external": (lambda m: external(m.graph.initializer[0]), r"a constant \(c\) with data in another file"),
    "located elsewhere": (located_only, "data in another file"),
    "external in an attribute": (
        node("Constant", value=external(helper.make_tensor("v", 1, [1], [1.0]))),
        r"a constant \(v\) with data in another file",
    ),
    "external in a subgraph": (
        node("If", then_branch=external_graph(), else_branch=identity()),
        "data in another file",
    ),
    "sparse": (sparse, "a sparse constant"),
    "function": (function, "a function"),
    "training information": (lambda m: m.training_info.add(), "training information"),
    "loop": (node("Loop", body=identity()), "a subgraph in operator Loop"),
    "subgraph under another name": (node("Relu", body=identity()), "a subgraph in operator Relu"),
    "subgraphs": (node("If", branches=[identity()]), "unknown field 11 in a message of kind attribute"),
    "deep": (lambda m: m.graph.CopyFrom(nested(MAX_DEPTH + 1)), f"more than {MAX_DEPTH} deep"),
    "custom domain": (node("Leak", domain="evil"), "operator Leak of domain 'evil'"),
    "context of a provider": (node("EPContext", domain="com.microsoft"), "operator EPContext"),
    "python": (node("PythonOp", domain="com.microsoft"), "operator PythonOp"),
    "text": (node("Constant", value=helper.make_tensor("v", TensorProto.STRING, [1], [b"a"])), "unknown field 6"),
}


def test_what_we_write_is_let_through() -> None:
    check_graph(model().SerializeToString())
    whole = model()
    whole.graph.CopyFrom(nested(MAX_DEPTH))
    check_graph(whole.SerializeToString())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", HOSTILE)
def test_what_reaches_beyond_the_file_is_refused(kind: str, *, training: bool) -> None:
    spoil, words = HOSTILE[kind]
    hostile = model()
    spoil(hostile)
    with pytest.raises(ValueError, match=words):
        check_graph(hostile.SerializeToString(), training=training)


def test_operators_of_training_are_for_its_files() -> None:
    trained = model()
    node("ConvGrad", domain="com.microsoft")(trained)
    check_graph(trained.SerializeToString(), training=True)
    with pytest.raises(ValueError, match=r"operator ConvGrad of domain 'com\.microsoft'"):
        check_graph(trained.SerializeToString())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file"),
        (b"\x3a", "cut short"),
        (b"\x3a\x05\x12", "cut short"),
        (b"\x3a\x03\x12\x01\xff", "not UTF-8"),
        (b"\x38\x01", "a number in place of a graph"),
        (b"\x0a\x01x", "bytes in place of a number"),
        (b"\x3b\x3c", "a field of type 3"),
        (b"\x00\x00", "a field with key 0"),
        (b"\xba\x80\x80\x80\x10\x00", "a field with key 4294967354"),
        (b"\x3a" + b"\xff" * 11, "a damaged varint"),
        (b"\x92\x03\x00", "unknown field 50 in a message of kind model"),
        (b"\x3a\x08\x0a\x06\x22\x01a\x22\x01b", "a node of several operators"),
        (b"\x3a\x0c\x2a\x0a\x70\x80\x80\x80\x80\x80\x80\x80\x80\x01", "data in another file"),
    ],
)
def test_damaged_messages_are_refused_by_name(content: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_graph(content)


def test_fields_of_every_type() -> None:
    message = memoryview(b"\x08\x96\x01\x11abcdefgh\x1a\x02hi\x25wxyz")
    found = [(number, value if isinstance(value, int) else bytes(value)) for number, value in fields(message)]
    assert found == [(1, 150), (2, b"abcdefgh"), (3, b"hi"), (4, b"wxyz")]


def test_no_mutation_smuggles_external_data() -> None:
    """Whatever onnx still reads as a model with data elsewhere is refused, and nothing but a ValueError is raised."""
    hostile = model()
    node("If", then_branch=external_graph(), else_branch=identity())(hostile)
    content, random = hostile.SerializeToString(), np.random.default_rng(0)
    smuggled = 0
    for _ in range(3000):
        mutant = bytearray(content)
        for _ in range(random.integers(1, 4)):
            mutant[random.integers(len(mutant))] = random.integers(256)
        try:
            check_graph(bytes(mutant))
        except ValueError:
            smuggled += _reads_elsewhere(bytes(mutant))
            continue
        assert not _reads_elsewhere(bytes(mutant))
    assert smuggled > 100  # so the property is tested where it matters


def _reads_elsewhere(content: bytes) -> bool:
    try:
        parsed = onnx.ModelProto.FromString(content)
    except Exception:  # noqa: BLE001 - of protobuf's own kind, which depends on its implementation
        return False
    return any(
        tensor.data_location == TensorProto.EXTERNAL or tensor.external_data
        for node in parsed.graph.node
        for attribute in node.attribute
        for tensor in attribute.g.initializer
    )


@pytest.fixture
def stealing(here: Path) -> Callable[[str], None]:
    """Put a constant that lies in a secret file into a graph of the bundle, and sign the manifest anew."""

    def steal(name: str) -> None:
        source = Path("bundle").resolve()
        Path("bundle").unlink()
        shutil.copytree(source, "bundle")
        secret = here / "secret"
        secret.write_bytes(b"\x00\x00\x80\x3f" * 16)
        path = Path("bundle") / name
        spoiled = onnx.load(path)
        spoiled.graph.initializer.append(
            external(helper.make_tensor("leak", TensorProto.FLOAT, [16], [0.0] * 16), str(secret))
        )
        content = spoiled.SerializeToString()
        path.write_bytes(content)
        manifest = json.loads((Path("bundle") / MANIFEST).read_text())
        manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        (Path("bundle") / MANIFEST).write_text(json.dumps(manifest))

    return steal


TRAIN = ("train", "bundle", "--data", "d.npz", "--lr", "0.1", "-o", "u.safetensors")
EVALUATE = ("evaluate", "bundle", "--data", "d.npz")


@pytest.mark.parametrize(
    ("graph", "command"),
    [
        ("train_step.onnx", (*TRAIN, "--engine", "onnxruntime", "--state", "s")),
        ("eval_step.onnx", (*EVALUATE, "--engine", "onnxruntime")),
        ("training_model.onnx", (*TRAIN, "--engine", "ort-training", "--state", "s")),
        ("eval_model.onnx", (*EVALUATE, "--engine", "ort-training")),
        ("eval_model.onnx", ("fold", "bundle", "-o", "m.onnx")),
    ],
)
def test_no_command_reads_a_file_that_a_bundle_names(
    run: Command, stealing: Callable[[str], None], graph: str, command: tuple[str, ...]
) -> None:
    stealing(graph)
    ended = run(*command)
    assert ended.code == 6, ended.err
    assert f"{graph}: expected a self-contained graph, found a constant (leak) with data in another file" in ended.err
    assert not Path("u.safetensors").exists()
    assert not Path("m.onnx").exists()


def tanh_of(graph: onnx.GraphProto) -> onnx.NodeProto:
    return next(node for node in graph.node if node.op_type == "Tanh")


UNFOLDABLE: dict[str, Callable[[onnx.GraphProto], object]] = {
    "an input from nowhere": lambda graph: tanh_of(graph).input.append("nowhere"),
    "an operator of other inputs": lambda graph: setattr(tanh_of(graph), "op_type", "Where"),
    "an unknown operator": lambda graph: setattr(tanh_of(graph), "op_type", "Whatever"),
    "no nodes": lambda graph: graph.ClearField("node"),
}


@pytest.mark.parametrize("name", UNFOLDABLE)
@pytest.mark.parametrize("source", ["eval_model.onnx", "eval_step.onnx"])
def test_a_graph_that_can_not_be_folded_is_refused_by_name(
    name: str, source: str, tmp_path: Path, small_bundle: SmallBundle
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(small_bundle().path, folder)
    if source == "eval_step.onnx":
        (folder / "eval_model.onnx").unlink()
    graph = onnx.load(folder / source)
    UNFOLDABLE[name](graph.graph)
    onnx.save(graph, folder / source)
    write_manifest(folder, small_bundle().manifest)
    bundle = open_bundle(folder)
    with pytest.raises(FedparaError, match=r"expected .*, found ") as refused:
        fold(bundle, read_weights(bundle.file(WEIGHTS)), tmp_path / "model.onnx")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "model.onnx").exists()
