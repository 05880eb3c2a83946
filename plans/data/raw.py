"""Raw data of the scripts in this folder, and the files that they write for the plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from fedpara_edge.storage.atomic import check_output, replacing_file

HERE = Path(__file__).parent
RAW = HERE.parent.parent.parent / "shared" / "data"
"""Beside the repository: ../shared/data, seen from its root."""


def source_option(name: str) -> Any:
    """Option `--source`, by default a file of `RAW`."""
    help_text = f"Raw data.  [default: ../shared/data/{name}]"
    return click.option("--source", type=click.Path(path_type=Path), default=RAW / name, help=help_text)


def output_option(name: str) -> Any:
    """Option `-o`, by default a file in this folder."""
    help_text = f"File to write.  [default: plans/data/{name}]"
    return click.option("-o", "--output", type=click.Path(path_type=Path), default=HERE / name, help=help_text)


def read(source: Path, names: tuple[str, ...], *, content: str) -> dict[str, NDArray[Any]]:
    """Arrays of an `.npz` by name.

    Raises:
        ClickException: There is no such file, or it lacks an array, which the message names.
    """
    if not source.is_file():
        raise click.ClickException(
            f"{source}: expected an .npz with {content} as {', '.join(names)}, found none; pass it with --source"
        )
    with np.load(source, allow_pickle=False) as archive:
        missing = [name for name in names if name not in archive.files]
        if missing:
            raise click.ClickException(
                f"{source}: expected {content} as {', '.join(names)}, found no {missing[0]!r}; pass another --source"
            )
        return {name: archive[name] for name in names}


def write(output: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Write an `.npz`, replacing an older one, and print what is in it."""
    check_output(output, overwrite=True)
    with replacing_file(output) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    for name, array in arrays.items():
        click.echo(f"{output}: {name} {array.dtype} {list(array.shape)}")
