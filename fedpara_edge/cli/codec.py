"""`fedpara-edge codec bench`: what each codec would make of an update."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fedpara_edge.cli.command import Group
from fedpara_edge.cli.options import PATH
from fedpara_edge.cli.output import emit, json_option, megabytes, overwrite_option, table
from fedpara_edge.cli.streams import drawing, printable
from fedpara_edge.errors import InputError

if TYPE_CHECKING:
    from fedpara_edge.formats.codecbench import Measured

MAX_SECONDS = 60


@click.group("codec", cls=Group)
def command() -> None:
    """Compare the codecs that changes are written with."""


@command.command("bench")
@click.argument("file", type=PATH)
@click.option("--weights", type=PATH, required=True, help="Weights of the same bundle, which tell the tensors.")
@click.option("--codec", multiple=True, help="Codec to compare, several times.  [default: the usual ones]")
@click.option("--seconds", type=float, default=0.1, show_default=True, help="For the speed of each codec, each way.")
@click.option("--plot", type=PATH, help="Picture of error against bits to write: .png, .svg or .pdf.")
@overwrite_option
@json_option
def bench(
    file: Path, weights: Path, codec: tuple[str, ...], seconds: float, plot: Path | None, overwrite: bool, json: bool
) -> None:
    """Encode the change in FILE, an update or a published change, with codecs of every kind.

    Errors are relative to the change: of rounding to the nearest, as with error feedback, and of random rounding, where
    the codec has it. Best on an update that was written as float32.
    """
    from fedpara_edge.codecs.codec import in_order
    from fedpara_edge.formats.codecbench import USUAL, compare
    from fedpara_edge.formats.encoded import open_encoded, read_change
    from fedpara_edge.formats.weights import read_weights
    from fedpara_edge.storage.atomic import check_output

    if not 0 <= seconds <= MAX_SECONDS:  # NaN neither
        raise InputError(f"seconds: expected a number from 0 to {MAX_SECONDS}, found {seconds}")
    if plot is not None:
        from fedpara_edge.report.figures import check_picture

        check_picture(plot, key="plot")
        check_output(plot, overwrite=overwrite)
    base = read_weights(weights)
    with open_encoded(file, base) as opened:
        tensors = in_order(base.layout.shared)
        change = read_change(opened, tensors)
    rows: list[Measured] = []
    names = codec or USUAL
    with click.progressbar(
        compare(tensors, change, names, seconds=seconds),
        length=len(names),
        label="codecs",
        file=drawing(sys.stderr),
        hidden=not sys.stderr.isatty(),
    ) as measured:
        rows.extend(measured)
    left_out = [name for name in names if name not in {row.codec for row in rows}]
    dense = 4 * base.layout.dense_parameters
    if plot is not None:
        from fedpara_edge.report.codecplots import write_picture

        write_picture(plot, rows, printable(file.name))
    text = (
        f"{file}: {len(change):,} parameters, {megabytes(4 * len(change))} in float32, of a dense model of "
        f"{megabytes(dense)}\n\n{_table(rows, dense)}"
    )
    if left_out:
        text += f"\n\nleft out, as an entry of this change is too large for them: {', '.join(left_out)}"
    result = {"file": file, "parameters": len(change), "dense_bytes": dense, "left_out": left_out}
    emit({**result, "codecs": [row.to_json() for row in rows]}, text, as_json=json)


def _table(rows: Sequence[Measured], dense: int) -> str:
    header = ("codec", "bytes", "bits", "of dense", "error", "random", "encode MB/s", "decode MB/s")
    cells = [
        (
            row.codec,
            f"{row.bytes:,}",
            f"{row.bits_per_parameter:.2f}",
            f"{row.bytes / dense:.2%}",
            f"{row.error:.4f}",
            "-" if row.random_error is None else f"{row.random_error:.4f}",
            f"{row.encode_mb_per_s:,.0f}",
            f"{row.decode_mb_per_s:,.0f}",
        )
        for row in rows
    ]
    return table(header, cells)
