"""Remedies for data that does not fit: typed as they stand, they make it fit and keep every number in its place."""

import re

import numpy as np
import pytest

from device_runtime.remedies import remedy_for_dtype, remedy_for_shape
from fedpara_edge.formats.interface import ArraySpec

IMAGES = ArraySpec("x", (3, 8, 6), "float32")
LABELS = ArraySpec("y", (), "int64", 3)


def numbered(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def followed(remedy, **arrays):
    """What an expression in a remedy makes."""
    (expression,) = re.findall(
        r"numpy\.\w+\(.*?\)+(?=$|;| with)|\(?\w+ [*/] \d+\).*?\)$|\w+\.\w+\(.*?\)+(?=$|;)", remedy
    )
    return eval(expression, {"numpy": np, **arrays})


CASES = {
    "channels last": (IMAGES, numbered(2, 8, 6, 3), lambda x: x.transpose(0, 3, 1, 2)),
    "square, channels last": (
        ArraySpec("x", (3, 8, 8), "float32"),
        numbered(2, 8, 8, 3),
        lambda x: np.moveaxis(x, 3, 1),
    ),
    "time and channels": (ArraySpec("x", (9, 50), "float32"), numbered(2, 50, 9), lambda x: x.transpose(0, 2, 1)),
    "no channel axis": (ArraySpec("x", (1, 8, 6), "float32"), numbered(2, 8, 6), lambda x: x[:, None]),
    "one channel last": (ArraySpec("x", (1, 8, 6), "float32"), numbered(2, 8, 6, 1), lambda x: x[..., 0][:, None]),
    "an axis too many": (ArraySpec("x", (8, 6), "float32"), numbered(2, 8, 6, 1), lambda x: x[..., 0]),
    "flat rows": (ArraySpec("x", (8, 6), "float32"), numbered(2, 48), lambda x: x.reshape(2, 8, 6)),
    "column of labels": (LABELS, numbered(2, 1), lambda y: y[:, 0]),
    "row of targets": (ArraySpec("y", (1,), "float32"), numbered(2), lambda y: y[:, None]),
    "one-hot": (LABELS, np.eye(3)[[2, 0, 1]], lambda y: y.argmax(axis=1)),
    "one-hot at positions": (ArraySpec("y", (4,), "int64", 3), np.eye(3)[np.arange(8).reshape(2, 4) % 3], np.argmax),
}


@pytest.mark.parametrize("case", CASES)
def test_a_remedy_for_a_shape_keeps_every_number_in_its_place(case):
    spec, array, right = CASES[case]
    remedy = remedy_for_shape(array, spec, of_input=spec.name == "x")
    expected = array.argmax(axis=-1) if right is np.argmax else right(array)
    np.testing.assert_array_equal(followed(remedy, **{spec.name: array}), expected)
    assert expected.shape[1:] == spec.shape


def test_a_reshape_is_never_advised_where_axes_are_to_be_moved():
    remedy = remedy_for_shape(numbered(2, 8, 6, 3), IMAGES, of_input=True)
    assert "reshape(" not in remedy
    assert remedy.endswith("a reshape would scramble the values")


def test_images_of_another_size_are_resized_and_their_channels_moved():
    remedy = remedy_for_shape(numbered(2, 20, 20, 3), IMAGES, of_input=True)
    assert remedy.startswith("resize the images to 8x6 and move their channels first with numpy.transpose(x, (0, 3, 1")


def test_classes_along_the_last_axis_are_told_apart_from_positions():
    """A model [N, T, C] was exported as C positions of T classes; labels come for T positions."""
    label = ArraySpec("y", (7,), "int64", 50)
    remedy = remedy_for_shape(np.zeros((4, 50), int), label, of_input=False)
    assert "outputs [N, 50, 7] have their classes along axis 1" in remedy
    assert ".movedim(-1, 1)" in remedy
    assert "movedim" not in remedy_for_shape(np.zeros((4, 51), int), label, of_input=False)


def test_pixels_are_scaled_as_they_were():
    pixels = np.array([[0, 51, 255]], np.uint8)
    to_bytes = remedy_for_dtype(pixels / np.float32(255), ArraySpec("x", (3,), "uint8"), of_input=True)
    np.testing.assert_array_equal(followed(to_bytes, x=pixels / np.float32(255)), pixels)
    to_numbers = remedy_for_dtype(pixels, ArraySpec("x", (3,), "float32"), of_input=True)
    np.testing.assert_array_equal(followed(to_numbers, x=pixels), np.float32(pixels / 255))


def test_names_of_classes_get_their_numbers():
    remedy = remedy_for_dtype(np.array(["owl", "cat", "dog"]), LABELS, of_input=False)
    assert "{'cat': 0, 'dog': 1, 'owl': 2}" in remedy
    assert "here are 2 of 3: 'cat', 'owl'" in remedy_for_dtype(np.array(["owl", "cat"]), LABELS, of_input=False)
    assert "4 names for 3" in remedy_for_dtype(np.array(list("abcd")), LABELS, of_input=False)
