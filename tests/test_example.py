"""Real data at export: it tells what a model takes, and verifies the files and the folded model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Command
from norms import norm
from onnx import TensorProto, helper, numpy_helper

from export import make_bundle
from export.batches import Batches
from export.folding.inputs import normalization, random_inputs
from export.forward.preprocess import Preprocessing
from fedpara_edge.errors import InputError
from fedpara_edge.formats.bundle import open_bundle
from fedpara_edge.formats.inputs import InputDtype
from fedpara_edge.formats.interface import ArraySpec
from fedpara_edge.formats.recipe import Recipe

MODELS = '''
import torch
from torch import nn

def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 5),
    )

def tagger():
    return nn.Sequential(nn.Embedding(30, 8), nn.Flatten(), nn.Linear(48, 5))

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Embedding(12, 8), nn.Linear(16, 3)

    def forward(self, image, category):
        return self.head(torch.cat([self.a(image), self.b(category)], 1))

class Positive(nn.Module):
    """A logarithm, which N(0, 1) does not have."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(torch.log(x))
'''
Make = Callable[..., Recipe]


@pytest.fixture
def recipe(tmp_path: Path) -> Make:
    """Recipe for a model of `MODELS`, with some arrays as its example."""

    def make(model: str, arrays: dict[str, Any], **options: Any) -> Recipe:
        (tmp_path / "models.py").write_text(MODELS)
        np.savez(tmp_path / "data.npz", **arrays)
        engines = ("onnxruntime",)
        return Recipe(name=f"{tmp_path}/models.py:{model}", example=tmp_path / "data.npz", engines=engines, **options)

    return make


@pytest.mark.slow
def test_shapes_dtypes_and_tokens_are_those_of_the_example(recipe: Make, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 30, (9, 6), np.int32), np.arange(9) % 5
    x[0, 0] = 29
    built = make_bundle(recipe("tagger", {"x": x, "y": y}), tmp_path / "tagger")
    assert built.bundle.manifest.interface.inputs == (ArraySpec("x", (6,), "int64", 30),)
    assert built.bundle.manifest.model == "models.py:tagger"  # not where it was
    images = generator.integers(0, 256, (9, 3, 12, 12), np.uint8)
    given = recipe("convolutions", {"x": images, "y": y}, mean=(0.5,), std=(0.2,))
    built = make_bundle(given, tmp_path / "convolutions")
    assert built.bundle.manifest.interface.inputs == (ArraySpec("x", (3, 12, 12), "uint8"),)


def test_arrays_by_other_names_are_several_inputs(recipe: Make, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    arrays = {"image": generator.random((9, 6), np.float32), "category": np.arange(9) + 3, "y": np.arange(9) % 3}
    built = make_bundle(recipe("Two", arrays), tmp_path / "two")
    expected = (ArraySpec("category", (), "int64", 12), ArraySpec("image", (6,), "float32"))
    assert built.bundle.manifest.interface.inputs == expected


def test_the_example_is_what_verifies(recipe: Make, tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((9, 6), np.float32) + np.float32(0.5)
    make_bundle(recipe("Positive", {"x": x}), tmp_path / "real")
    with pytest.raises(InputError, match="found NaN or Inf on every batch"):
        make_bundle(recipe("Positive", {"x": -x}), tmp_path / "negative")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((4, 6))}, r"example: .*'x': expected uint8, float32, bool or integers, found float64"),
        ({"y": np.zeros(4)}, r"expected an array 'x', or one for each argument of the model, found none"),
        ({"x": np.zeros((0, 6), np.float32)}, r"example: array 'x': expected at least one row"),
        ({"x": np.full((4, 6), np.nan, np.float32)}, r"example: array 'x': expected finite float32"),
        (
            {"x": np.ones((4, 6), np.float32), "y": np.arange(4) + 9},
            r"example: array 'y': expected integers in \[0, 5\)",
        ),
    ],
)
def test_an_example_that_does_not_fit_is_refused(
    arrays: dict[str, Any], message: str, recipe: Make, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as refused:
        make_bundle(recipe("Positive", arrays), tmp_path / "bundle")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "bundle").exists()


def test_random_inputs_are_those_that_the_model_expects() -> None:
    def drawn(dtype: InputDtype, shape: tuple[int, ...], **more: Any) -> np.ndarray:
        spec, preprocessing = ArraySpec("x", shape, dtype), Preprocessing(dtype, shape, **more)
        (x,) = Batches(inputs=[spec], preprocessings=[preprocessing], seed=0).draw(500).inputs.values()
        assert x.dtype == dtype
        return x

    pressure = drawn("float32", (2, 8), mean=(101325.0, 9.81), std=(600.0, 0.49))
    np.testing.assert_allclose(pressure.mean((0, 2)), [101325, 9.81], rtol=1e-2)
    np.testing.assert_allclose(pressure.std((0, 2)), [600, 0.49], rtol=5e-2)
    images = drawn("uint8", (1, 8, 8), mean=(0.286,), std=(0.1,))
    assert abs(images.mean() - 255 * 0.286) < 1
    assert abs(images.std() - 25.5) < 1
    assert abs(drawn("uint8", (1, 8, 8)).mean() - 127.5) < 1


def test_normalization_is_read_from_a_graph() -> None:
    def graph(*nodes: Any) -> Any:
        values = {"scale": np.float32([[[2.0]], [[4.0]]]), "shift": np.float32([[[1.0]], [[8.0]]])}
        tensors = [numpy_helper.from_array(value, name) for name, value in values.items()]
        return helper.make_model(helper.make_graph(nodes, "graph", [], [], tensors))

    cast = helper.make_node("Cast", ["x"], ["a"], to=TensorProto.FLOAT)
    scaled, shifted = helper.make_node("Mul", ["a", "scale"], ["b"]), helper.make_node("Add", ["b", "shift"], ["c"])
    rest = helper.make_node("Relu", ["c"], ["d"])
    scale, shift = normalization(graph(cast, scaled, shifted, rest).graph, "x")
    assert (np.ravel(scale).tolist(), np.ravel(shift).tolist()) == ([2.0, 4.0], [1.0, 8.0])
    assert normalization(graph(helper.make_node("Mul", ["x", "x"], ["b"])).graph, "x")[0] == 1
    assert normalization(graph(helper.make_node("Relu", ["x"], ["a"])).graph, "x")[0] == 1


def test_a_model_far_from_zero_folds_to_int8(run: Command, recipe: Make, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    x = (9.81 + 0.49 * generator.standard_normal((64, 3, 16, 16))).astype(np.float32)
    made = recipe("convolutions", {"x": x, "y": generator.integers(0, 5, 64)})
    bundle = tmp_path / "bundle"
    shown = run("export", made.name, "--example", made.example, "--mean", 9.81, "--std", 0.49, "-o", bundle)
    assert shown.code == 0, shown.err
    assert "\x1b" not in shown.err + shown.out  # no line of steps where there is no terminal
    for number, data in enumerate((["--data", made.example], [])):
        folded = run("fold", bundle, *data, "--precision", "int8", "-o", tmp_path / f"{number}.onnx", "--json")
        assert folded.code == 0, folded.err
        assert folded.json["error"] < 0.2
    interface = open_bundle(bundle).manifest.interface
    assert abs(norm(random_inputs(interface, 4)["x"]) - norm(np.ones((4, 3, 16, 16)))) < 5
