"""Files made from a run: the whole report, or one of its figures.

They depend on metrics and plan alone: made again, they are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fedpara_edge.errors import InputError
from fedpara_edge.report.document import page_of
from fedpara_edge.report.figures import CAPTIONS, why_left_out, write_one, write_pngs
from fedpara_edge.report.results import read_results
from fedpara_edge.report.summarizing import select, summarize
from fedpara_edge.simulation.folder import RunFolder
from fedpara_edge.storage.atomic import check_output, remove_leftovers, replacing_file
from fedpara_edge.storage.wholefile import read_text, real_path

REPORT = "report.html"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Files of a report, and notes for its reader.

    Attributes:
        page: Path of `report.html`.
        figures: Paths of the PNGs.
        notes: Arms and seeds that are missing or unfinished, one line each.
        left_out: Reason why there are no figures, with the line to type; None if there are.
    """

    page: Path
    figures: tuple[Path, ...]
    notes: tuple[str, ...]
    left_out: str | None


def write_report(run: Path | str, output: Path | str | None = None, *, overwrite: bool = False) -> Report:
    """Write `report.html`, which needs no other file, and a PNG for each figure.

    Args:
        run: Run folder, with `plan.toml` and `metrics.jsonl`; the run may be unfinished.
        output: Folder to write into, made if it is missing; None for the run folder, whose earlier report is replaced.
        overwrite: Whether an earlier report in another folder is replaced.

    Raises:
        InputError: Plan or metrics are missing or damaged, no arm has begun, or `output` has a report already.
        FedparaError: The disk refuses the write.
    """
    run, output = Path(run), None if output is None else Path(output)
    summary = summarize(results := read_results(run))
    folder = run if output is None else output
    if real_path(folder) != real_path(run):
        check_output(folder, overwrite=True, folder=True)
        folder.mkdir(exist_ok=True)
        for name in CAPTIONS:
            remove_leftovers(folder / _png(name))
        check_output(folder / REPORT, overwrite=overwrite)  # written last, so that a report cut short is completed
    is_again = (folder / REPORT).exists()
    figures = write_pngs(folder, summary, overwrite=overwrite or real_path(folder) == real_path(run))
    if is_again:
        for name in CAPTIONS.keys() - figures.keys():
            (folder / _png(name)).unlink(missing_ok=True)
    left_out = why_left_out()
    notes = [*summary.notes, *([] if left_out is None else [f"{left_out[0].upper()}{left_out[1:]}"])]
    plan = RunFolder(run).plan
    source = read_text(plan) if plan.is_file() else None
    page = folder / REPORT
    with replacing_file(page) as temporary:
        temporary.write_text(page_of(results, summary, figures, notes=notes, source=source), encoding="utf-8")
    return Report(
        page=page,
        figures=tuple(folder / _png(name) for name in figures),
        notes=summary.notes,
        left_out=left_out,
    )


def write_figure(
    run: Path,
    name: str,
    output: Path,
    *,
    arms: Mapping[str, str] | None = None,
    target: float | None = None,
    title: str = "",
    overwrite: bool = False,
) -> None:
    """Write one figure of a run.

    Args:
        run: Run folder, with `plan.toml` and `metrics.jsonl`.
        name: Figure to draw, such as `accuracy-by-bytes`.
        output: File to write, `.svg`, `.png` or `.pdf`.
        arms: Arms to draw, each with the name it gets in the figure; None for all, under their own.
        target: Accuracy to reach, in (0, 1); None for those of the report.
        title: Title above the figure.
        overwrite: Whether an existing file is replaced.

    Raises:
        InputError: The run can't be read, has no such arm or figure, the target is out of range, the suffix is another,
            `output` exists, or matplotlib is not installed.
        FedparaError: The disk refuses the write.
    """
    check_output(output, overwrite=overwrite)
    if target is not None and not 0 < target < 1:
        raise InputError(f"expected an accuracy between 0 and 1, found {target}", key="target")
    summary = summarize(read_results(run))
    if arms is not None:
        summary = select(summary, arms)
    if target is not None:
        summary = replace(summary, targets=(target,))
    write_one(output, name, summary, title=title)


def _png(name: str) -> str:
    return f"{name}.png"
