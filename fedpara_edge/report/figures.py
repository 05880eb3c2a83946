"""Files with figures. They need matplotlib; this is the one module that checks whether it is installed."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from fedpara_edge.errors import InputError
from fedpara_edge.report.page import Figure
from fedpara_edge.report.summary import Summary
from fedpara_edge.storage.atomic import replacing_file

CAPTIONS = {
    "accuracy-by-round": "Accuracy by round: mean over the seeds, with a band of one standard deviation.",
    "accuracy-by-bytes": "Accuracy over all that was sent until then, on a logarithmic axis: points are means over the "
    "seeds, with a band of one standard deviation; lines are smoothed, and cross a target where the arm reaches it.",
    "bytes-to-target": "What all participants sent, up and down, until an arm reached the accuracy.",
    "seconds-per-round": "One participant's round: computing as measured here, sending as computed for the link.",
    "clients": "One point per client (of all seeds); the box spans the middle half, its line is the median.",
    "ranks": "Rank of the composed weight of each factored layer when it was last measured, mean over the seeds.",
    "gap": "The gap by round, mean over the seeds, with a band of one standard deviation.",
    "norms": "Frobenius norms by round, mean over the seeds, with a band of one standard deviation.",
}
"""Captions of the figures, by name."""
FORMATS = (".png", ".svg", ".pdf")
INSTALL = "pip install 'matplotlib>=3.8'"


def why_left_out() -> str | None:
    """Why figures can't be drawn here, with the line to type; None if they can."""
    if find_spec("matplotlib") is not None:
        return None
    return f"figures were left out: they need matplotlib, which is not installed here; type: {INSTALL}"


def check_picture(path: Path, *, key: str) -> None:
    """Refuse a picture that can't be drawn here, before any work is done for it.

    Args:
        path: File to write.
        key: Option that asks for the picture.

    Raises:
        InputError: The file's suffix is none of `FORMATS`, or matplotlib is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{path}: expected a picture's name that ends in {', '.join(FORMATS)}; rename it")
    if why_left_out() is not None:
        raise InputError(f"expected matplotlib to be installed, found none; type: {INSTALL}", key=key)


def write_pngs(folder: Path, summary: Summary, *, overwrite: bool) -> Mapping[str, Figure]:
    """Write a PNG of every figure.

    Args:
        folder: Folder that the files `NAME.png` are written into.
        summary: Summary to draw.
        overwrite: Whether to replace files that exist with other content.

    Returns:
        The same figures for an HTML page, by name; none without matplotlib.
    """
    if why_left_out() is not None:
        return {}
    from fedpara_edge.report.plots.drawing import draw
    from fedpara_edge.report.plots.style import to_element, to_png

    pages: dict[str, Figure] = {}
    for name, drawn in draw(summary).items():
        _write(folder / f"{name}.png", to_png(drawn), overwrite=overwrite)
        pages[name] = Figure(to_element(drawn, name, CAPTIONS[name]), CAPTIONS[name])
    return pages


def write_one(path: Path, name: str, summary: Summary, *, title: str = "") -> None:
    """Write one figure, in the format of the file's suffix.

    Args:
        path: File to write, `.svg`, `.png` or `.pdf`.
        name: Figure to draw, one of `CAPTIONS`.
        summary: Summary to draw.
        title: Title above the figure.

    Raises:
        InputError: The suffix is another, the run has measured nothing for this figure, or matplotlib is not installed.
        FedparaError: The disk refuses the write.
    """
    check_picture(path, key="figure")
    from fedpara_edge.report.plots.drawing import draw, draw_one
    from fedpara_edge.report.plots.style import to_pdf, to_png, to_svg

    drawn = draw_one(summary, name, title=title)
    if drawn is None:
        there = ", ".join(draw(summary))
        raise InputError(f"expected one of this run's figures, {there}, found {name!r}", key="figure")
    match path.suffix.lower():
        case ".svg":
            _write(path, to_svg(drawn, title or CAPTIONS[name]))
        case ".pdf":
            _write(path, to_pdf(drawn))
        case _:
            _write(path, to_png(drawn))


def _write(path: Path, content: bytes, *, overwrite: bool = True) -> None:
    with replacing_file(path, overwrite=overwrite) as temporary:
        temporary.write_bytes(content)
