"""Labels by the names of their classes: the same numbers on every device, whatever each has."""

from pathlib import Path

import numpy as np
import pytest
from softmax_regression import make_manifest

from device_runtime.data import open_data, open_inputs
from device_runtime.labels import numbered, with_axes
from device_runtime.sources import Reading
from fedpara_edge.errors import InputError
from fedpara_edge.formats.interface import ArraySpec

PATH = Path("d.npz")
PETS = ArraySpec("y", (), "int64", 3, ("cat", "dog", "owl"))
UNNAMED = ArraySpec("y", (), "int64", 3)


def refusal(*arguments):
    with pytest.raises(InputError) as caught:
        numbered(PATH, *arguments)
    return str(caught.value)


def test_names_get_the_numbers_of_the_bundle():
    assert numbered(PATH, np.array(["owl", "cat"]), None, PETS).tolist() == [2, 0]
    assert numbered(PATH, np.array([b"owl", b"cat"]), None, PETS).tolist() == [2, 0]
    assert numbered(PATH, np.array([[0, 1], [1, 1]]), np.array(["dog", "owl"]), PETS).tolist() == [[1, 2], [2, 2]]
    assert "d.npz: class 'cow': expected one of cat, dog, owl, found another; rename it" in refusal(
        np.array(["cow"]), None, PETS
    )


def test_a_class_without_labels_may_be_unknown():
    assert numbered(PATH, np.array([0]), np.array(["dog", "cow"]), PETS).tolist() == [1]


def test_numbers_stay_as_they_are_unless_the_names_are_numbers():
    assert numbered(PATH, np.array([2, 0]), None, PETS).tolist() == [2, 0]
    from_one = ArraySpec("y", (), "int64", 3, ("1", "2", "3"))
    assert numbered(PATH, np.array([3, 1, 2]), None, from_one).tolist() == [2, 0, 1]
    assert "class '0': expected one of 1, 2, 3" in refusal(np.array([0]), None, from_one)


def test_without_names_in_the_bundle_all_classes_must_be_there():
    assert numbered(PATH, np.array([2, 0]), np.array(["a", "b", "c"]), UNNAMED).tolist() == [2, 0]
    message = refusal(np.array([0]), np.array(["dog", "owl"]), UNNAMED)
    assert "expected the 3 classes of the bundle, found dog, owl; a device that has some of them needs" in message
    assert "--class-names" in message


def test_labels_that_are_no_classes_stay():
    numbers = np.array([0.5], np.float32)
    assert numbered(PATH, numbers, None, ArraySpec("y", (), "float32")) is numbers


def test_axes_of_size_1_are_the_only_ones_to_change():
    array = np.arange(12).reshape(3, 1, 4)
    assert with_axes(array, (4,)).tolist() == array[:, 0].tolist()
    assert with_axes(array, (4, 1)).shape == (3, 4, 1)
    assert with_axes(array, (2, 2)).shape == (3, 1, 4)


def test_a_table_fits_a_model_as_it_is(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("a,b,c,d,label\n1,2,3,4,0\n5,6,7,8,2\n")
    dataset = open_data(path, make_manifest())
    x, y = dataset.rows(np.array([1]))
    x, y = (next(iter(array.values())) for array in (x, y))
    assert (x.tolist(), y.tolist()) == ([[5, 6, 7, 8]], [2])
    without = tmp_path / "x.csv"
    without.write_text("a,b,c,d\n1,2,3,4\n")
    assert open_inputs(without, make_manifest()).examples == 1
    with pytest.raises(InputError, match=r"expected shape \[N, 4\], found \[2, 2\]"):
        open_data(path, make_manifest(), Reading(column=("a", "b")))


def test_whole_numbers_of_a_table_are_targets_too(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("a,b,c,d,label\n1,2,3,4,7\n")
    dataset = open_data(path, make_manifest(loss="mse", y=(1,)))
    _, y = dataset.rows(np.array([0]))
    assert next(iter(y.values())).tolist() == [[7.0]]
