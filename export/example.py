"""Real data of a recipe (`read_example`): rows to verify with, and what they tell of the model's inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.forward.graph import INPUT, LABEL
from fedpara_edge.errors import InputError
from fedpara_edge.formats.recipe import Recipe
from fedpara_edge.losses import find_head
from fedpara_edge.storage.arrayfile import array_names, open_arrays


def read_example(recipe: Recipe) -> tuple[Recipe, dict[str, NDArray[Any]]]:
    """Recipe with the shapes and dtypes of its example where it has none of its own, and the example's arrays.

    An array `x` is the model's input; without one, all arrays but `y` are inputs by the names of the model's arguments.
    Classes have names where the recipe has them, or else those in `y_names`, or in `y` itself.

    Args:
        recipe: Recipe, with an example or without.

    Raises:
        InputError: The file is missing, damaged or foreign, lacks an input, or has one of another dtype.
    """
    path = recipe.example
    if path is None:
        return recipe, {}
    try:
        recipe, arrays = _with_class_names(recipe, open_arrays(path, array_names(path)))
        if recipe.input:
            return recipe, arrays
        if INPUT in arrays:
            dtype, tokens = _kind(INPUT, arrays[INPUT])
            given = recipe.input_dtype or dtype
            tokens = recipe.tokens or (tokens if given == "int64" else None)
            shape = recipe.input_shape or tuple(arrays[INPUT].shape[1:])
            return replace(recipe, input_shape=shape, input_dtype=given, tokens=tokens), arrays
        texts = [_text(name, array) for name, array in arrays.items() if name != LABEL]
    except InputError as error:
        raise error.about("example") from error
    if not texts:
        raise InputError(f"{path}: expected an array {INPUT!r}, or one for each argument of the model, found none")
    return replace(recipe, input=tuple(texts)), arrays


def _with_class_names(recipe: Recipe, arrays: dict[str, NDArray[Any]]) -> tuple[Recipe, dict[str, NDArray[Any]]]:
    """Recipe with the names of the classes, and the arrays that are numbers, with labels numbered as these names."""
    numbers = {name: array for name, array in arrays.items() if array.dtype.kind not in "US"}
    labels, names = arrays.get(LABEL), arrays.get(f"{LABEL}_names")
    if labels is not None and labels.dtype.kind in "US":
        names, numbers[LABEL] = np.unique(labels.astype(np.str_), return_inverse=True)
    if names is None or find_head(recipe.loss[0])[1].labels != "classes":
        return recipe, numbers
    found = [str(name) for name in names]
    if recipe.class_names and LABEL in numbers:
        unknown = [name for name in found if name not in recipe.class_names]
        if unknown:
            listed = ", ".join(recipe.class_names)
            raise InputError(
                f"{recipe.example}: class {unknown[0]!r}: expected one of {listed}; rename it, or name it too"
            )
        numbers[LABEL] = np.array([recipe.class_names.index(name) for name in found], np.int64)[numbers[LABEL]]
    return replace(recipe, class_names=recipe.class_names or tuple(found)), numbers


def _text(name: str, array: NDArray[Any]) -> str:
    """Input as it is typed."""
    dtype, tokens = _kind(name, array)
    shape = ",".join(map(str, array.shape[1:]))
    parts = [f"shape={shape}" if shape else "", f"dtype={dtype}", "" if tokens is None else f"tokens={tokens}"]
    return f"{name}:{','.join(filter(None, parts))}"


def _kind(name: str, array: NDArray[Any]) -> tuple[Any, int | None]:
    """Dtype of the model's input for an array, and the number of tokens for integers."""
    if array.dtype.name in ("uint8", "float32", "bool"):
        return array.dtype.name, None
    if array.dtype.kind in "iu" and array.size:
        return "int64", int(array.max()) + 1
    raise InputError(
        f"array {name!r}: expected uint8, float32, bool or integers, found {array.dtype}; convert it, as data for "
        "devices must be"
    )
