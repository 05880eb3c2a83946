"""Real data of a recipe (`read_example`): rows to verify with, and what they tell of the model's inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from export.forward.graph import INPUT, LABEL
from fedpara_edge.errors import InputError
from fedpara_edge.formats.recipe import Recipe
from fedpara_edge.storage.arrayfile import array_names, open_arrays


def read_example(recipe: Recipe) -> tuple[Recipe, dict[str, NDArray[Any]]]:
    """Recipe with the shapes and dtypes of its example where it has none of its own, and the example's arrays.

    An array `x` is the model's input; without one, all arrays but `y` are inputs by the names of the model's arguments.

    Args:
        recipe: Recipe, with an example or without.

    Raises:
        InputError: The file is missing, damaged or foreign, lacks an input, or has one of another dtype.
    """
    path = recipe.example
    if path is None:
        return recipe, {}
    try:
        arrays = open_arrays(path, array_names(path))
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
