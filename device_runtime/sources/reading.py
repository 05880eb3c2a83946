"""Options for reading foreign data, as commands and plans have them, and what a model expects of the result."""

from __future__ import annotations

from dataclasses import dataclass

from fedpara_edge.errors import InputError
from fedpara_edge.options import check, declared, option


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Options for reading images, sounds and tables as arrays.

    Args:
        image_size: Height and width to which images are resized, keeping their proportions and cutting off what
            protrudes; None for images that all have the same size.
        audio_samples: Samples of each sound, of which longer ones lose the end and shorter ones get zeros; None for
            sounds that are all as long.
        label_column: Columns of a table with the label, or with several numbers to predict.
        column: Columns of a table with the input; none for all others that hold numbers.
        window: Rows of a table in an example; None for one example a row.
        stride: Rows from the start of a window to that of the next; None for windows that follow one another.
        window_key: Column of a table; no window has rows with different values there.

    Raises:
        InputError: A value is out of its range, or without effect.
    """

    image_size: tuple[int, int] | None = option(
        None,
        minimum=1,
        metavar="H,W",
        unset="all must be alike",
        help="Images: height and width to resize to; what protrudes is cut off.",
    )
    audio_samples: int | None = option(
        None, minimum=1, unset="all must be alike", help="Sounds: samples of each; longer ones are cut, shorter padded."
    )
    label_column: tuple[str, ...] = option(
        ("label",), metavar="NAME", help="Tables: column with the label; several times for several numbers to predict."
    )
    column: tuple[str, ...] = option(
        (),
        metavar="NAME",
        unset="all others that hold numbers",
        help="Tables: column with the input, several times for several.",
    )
    window: int | None = option(None, minimum=1, unset="one", help="Tables: rows in an example.")
    stride: int | None = option(
        None, minimum=1, unset="the window", help="Tables: rows from the start of an example to that of the next."
    )
    window_key: str | None = option(
        None, metavar="NAME", help="Tables: column, such as a recording, whose values no example mixes."
    )

    def __post_init__(self) -> None:
        check(self)
        for name in ("stride", "window_key"):
            if getattr(self, name) is not None and self.window is None:
                raise InputError(f"expected with a window, found {getattr(self, name)!r} without", key=name)


def given(reading: Reading) -> list[str]:
    """Names of the options that are not at their defaults.

    >>> given(Reading(window=3))
    ['window']
    """
    return [name for name, each in declared(Reading).items() if getattr(reading, name) != each.default]


@dataclass(frozen=True)
class Wanted:
    """Shape and dtype that a model expects of its input.

    Args:
        shape: Shape of one example; None if it is not known.
        dtype: Name of the dtype; empty if it is not known.
    """

    shape: tuple[int, ...] | None = None
    dtype: str = ""
