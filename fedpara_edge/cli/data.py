"""`fedpara-edge data convert`: images, sounds and tables as arrays, for machines that can't read them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from device_runtime.sources import Reading
from fedpara_edge.cli.command import Group
from fedpara_edge.cli.options import PATH, options_of
from fedpara_edge.cli.output import emit, output_options


@click.group("data", cls=Group)
def command() -> None:
    """Turn images, sounds and tables into arrays."""


@command.command("convert")
@click.argument("source", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="Folder to write.")
@click.option("--bundle", type=PATH, help="Bundle whose input decides channels, layout and dtype.")
@options_of(Reading)
@output_options
def convert(
    source: Path, output: Path, bundle: Path | None, options: Mapping[str, Any], overwrite: bool, json: bool
) -> None:
    """Convert SOURCE, a folder of images or sounds by class or a table, to a folder of .npy files.

    The other commands take SOURCE itself as well and convert it on the way. This is for devices without Pillow, pyarrow
    or soundfile, which take the folder, and for a look at what is made of SOURCE.
    """
    from device_runtime.sources import ANY, NAMES, Wanted, convert_source
    from fedpara_edge.formats.bundle import open_bundle
    from fedpara_edge.storage.arrayfile import open_arrays

    wanted = ANY
    if bundle is not None:
        inputs = open_bundle(bundle).interface.inputs
        wanted = Wanted(inputs[0].shape, inputs[0].dtype) if len(inputs) == 1 else ANY
    convert_source(source, output, Reading(**options), wanted, overwrite=overwrite)
    arrays = {file.stem: open_arrays(output, (file.stem,))[file.stem] for file in sorted(output.glob("*.npy"))}
    names = arrays[NAMES].tolist() if NAMES in arrays else None
    result = {
        "folder": str(output),
        "arrays": {name: {"shape": [*array.shape], "dtype": array.dtype.name} for name, array in arrays.items()},
        "classes": names,
    }
    lines = [f"{output}: {len(arrays['x'])} examples"]
    for name, array in arrays.items():
        kind = "text" if array.dtype.kind == "U" else array.dtype.name
        values = f", from {array.min():g} to {array.max():g}" if array.dtype.kind in "iuf" else ""
        lines.append(f"{name}: {kind} {[*array.shape]}{values}")
    if names:
        lines.append(f"classes: {', '.join(f'{number} {name}' for number, name in enumerate(names))}")
    emit(result, "\n".join(lines), as_json=json)
