"""Figure of a comparison of codecs: error against bits. Imports matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure

from fedpara_edge.formats.codecbench import Measured
from fedpara_edge.storage.atomic import replacing_file

LABELS = ((-5, 4, "right"), (-5, 4, "right"), (5, 4, "left"), (6, -4, "left"), (5, 5, "left"), (-5, -10, "right"))
"""Offsets and alignments of the labels by line, so that those of neighbouring lines keep apart."""


def write_picture(path: Path, rows: Sequence[Measured], title: str) -> None:
    """Write a figure of error against bits, both logarithmic; the codecs of one name make a line.

    Args:
        path: Picture to write, in the format of its suffix: `.png`, `.svg` or `.pdf`.
        rows: Codecs to draw; those without any error are left out.
        title: Title of the figure.

    Raises:
        FedparaError: The disk refuses the write.
    """
    families: dict[str, list[Measured]] = {}
    for row in rows:
        if row.error > 0:
            families.setdefault(row.codec.partition(":")[0].rstrip("0123456789"), []).append(row)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for (family, members), (x, y, side) in zip(families.items(), cycle(LABELS), strict=False):
        members.sort(key=lambda row: row.bits_per_parameter)
        bits, errors = [row.bits_per_parameter for row in members], [row.error for row in members]
        (line,) = axes.plot(bits, errors, marker="o", markersize=4, label=family)
        for row in members:
            axes.annotate(
                row.codec.rpartition(":")[2],
                (row.bits_per_parameter, row.error),
                xytext=(x, y),
                textcoords="offset points",
                fontsize=7,
                ha=side,
                color=line.get_color(),
            )
    axes.set(xscale="log", yscale="log", xlabel="bits per parameter, whole file", ylabel="relative error")
    axes.set_title(title, parse_math=False)
    axes.grid(visible=True, which="both", alpha=0.2)
    if families:
        axes.legend()
    with replacing_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lower().lstrip("."), dpi=150)
