"""Class names of a bundle from its example, and examples that are images or tables."""

import re
from pathlib import Path

import numpy as np
import pytest
from command_line import Command
from PIL import Image

from export.example import read_example
from fedpara_edge.errors import InputError
from fedpara_edge.formats.bundle import open_bundle
from fedpara_edge.formats.recipe import Recipe
from fedpara_edge.simulation.bundles import with_example_as_arrays


def read(tmp_path, *, names=(), loss="cross_entropy", **arrays):
    """Recipe and arrays of an example with these arrays."""
    np.savez(tmp_path / "d.npz", x=np.zeros((3, 4), np.float32), **arrays)
    return read_example(Recipe(name="m.py:m", example=tmp_path / "d.npz", class_names=names, loss=(loss,)))


def test_names_come_from_the_example(tmp_path):
    recipe, arrays = read(tmp_path, y=np.array([1, 0, 1]), y_names=np.array(["cat", "dog"]))
    assert recipe.class_names == ("cat", "dog")
    assert arrays.keys() == {"x", "y"}
    recipe, arrays = read(tmp_path, y=np.array(["dog", "cat", "dog"]))
    assert recipe.class_names == ("cat", "dog")
    assert arrays["y"].tolist() == [1, 0, 1]
    assert read(tmp_path, y=np.array([1, 0, 1]))[0].class_names == ()


def test_names_that_are_given_number_the_labels_of_the_example(tmp_path):
    recipe, arrays = read(tmp_path, y=np.array(["dog", "cat", "dog"]), names=("owl", "dog", "cat"))
    assert recipe.class_names == ("owl", "dog", "cat")
    assert arrays["y"].tolist() == [1, 2, 1]
    with pytest.raises(InputError, match=r"example: .*d\.npz: class 'cow': expected one of owl, dog; rename it"):
        read(tmp_path, y=np.array(["dog", "cow", "dog"]), names=("owl", "dog"))


def test_numbers_to_predict_have_no_names(tmp_path):
    recipe, arrays = read(tmp_path, loss="mse", y=np.zeros((3, 1), np.float32), y_names=np.array(["cat"]))
    assert recipe.class_names == ()
    assert arrays.keys() == {"x", "y"}


def test_options_of_a_source_need_an_example():
    from device_runtime.sources import Reading

    with pytest.raises(InputError, match="window: expected for the example, found without"):
        with_example_as_arrays(Recipe(name="mlp"), Reading(window=3))


def test_a_folder_of_images_tells_all_that_an_export_needs(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("dog", "cat"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / name / "0.png")
    Path("own.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(90, 2))\n"
    )
    ended = run("export", "own.py:net", "--example", "photos", "--engines", "onnxruntime", "-o", "bundle")
    assert ended.code == 0, ended.err
    assert re.search(
        r"^x: uint8 \[3, 6, 5\], from 0\S* to \S+, mean 0\.\d+, standard deviation 0\.\d+ as the", ended.out, re.M
    )
    interface = open_bundle(Path("bundle")).interface
    assert (interface.inputs[0].shape, interface.inputs[0].dtype) == ((3, 6, 5), "uint8")
    assert interface.labels[0].class_names == ("cat", "dog")
    assert run("evaluate", "bundle", "--data", "photos").code == 0
