"""Inputs of a model as they are typed at export: a name, and options after a colon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedpara_edge.errors import InputError
from fedpara_edge.options import check, choose, option

InputDtype = Literal["uint8", "float32", "int64", "bool"]
MAX_SIZE = 1 << 20
"""Largest dimension of an input, and largest number of classes."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """One of several inputs of a model.

    Args:
        shape: Shape of one raw example; none for a single number, such as a column of a table.
        dtype: Dtype of the raw input: `uint8` (scaled to [0, 1] in the graph), `float32`, `int64` tokens or classes, or
            `bool`.
        tokens: Number of different tokens or classes, for int64.
        mean: Mean that is subtracted from the scaled input, one number or one per channel.
        std: Standard deviation by which it is then divided, likewise.

    Raises:
        InputError: A value is out of its range, or two values don't go together.
    """

    shape: tuple[int, ...] = option((), minimum=1, maximum=MAX_SIZE)
    dtype: InputDtype = option("float32")
    tokens: int | None = option(None, minimum=1)
    mean: tuple[float, ...] = option((0.0,))
    std: tuple[float, ...] = option((1.0,))

    def __post_init__(self) -> None:
        check(self)
        if (self.dtype == "int64") != (self.tokens is not None):
            raise InputError(
                f"expected with dtype int64 and only then, found {self.tokens} for {self.dtype}", key="tokens"
            )


def find_input(text: str) -> tuple[str, Input]:
    """Name of an input and the input that a text stands for.

    Raises:
        InputError: An option is unknown, or does not fit.

    >>> find_input("image:shape=1,28,28,dtype=uint8")[1].shape
    (1, 28, 28)
    """
    name = text.partition(":")[0]
    if not name.isidentifier():
        raise InputError(
            f"expected the name of an argument of the model, as in x:shape=1,28,28, found {text!r}", key="input"
        )
    return name, choose({name: Input}, text, key="input")
