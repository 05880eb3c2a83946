"""`fedpara-edge report`: measurements of a simulation as a page, a figure or a table."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from fedpara_edge.cli.command import Command
from fedpara_edge.cli.options import PATH
from fedpara_edge.cli.output import emit, json_option, note, overwrite_option
from fedpara_edge.errors import counted

STDOUT = Path("-")


@click.command("report", cls=Command, renamed={"--tensorboard": "--track tensorboard:FOLDER"})
@click.argument("run", type=PATH)
@click.option("-o", "--output", type=PATH, help="Folder for the report, or file for --figure.  [default: RUN]")
@click.option("--csv", type=PATH, help="Write a table instead, one row per arm, seed and round; - for stdout.")
@click.option(
    "--track",
    metavar="KIND:PLACE",
    help="Give the rounds to a tracker instead: tensorboard:FOLDER, mlflow:FILE_OR_URI, or wandb:FOLDER, offline.",
)
@click.option("--follow", is_flag=True, help="With --track: go on with rounds that are yet to come, until Ctrl-C.")
@click.option("--figure", metavar="NAME", help="Write one figure instead, such as accuracy-by-bytes: .svg, .png, .pdf.")
@click.option(
    "--arm",
    multiple=True,
    metavar="NAME[=LABEL]",
    help="With --figure: arm to draw, and its name in the figure; repeatable.",
)
@click.option(
    "--target",
    type=float,
    metavar="SHARE",
    help="With --figure: accuracy to reach instead of the report's, such as 0.86.",
)
@click.option("--title", help="With --figure: title above the figure.")
@overwrite_option
@json_option
def command(
    run: Path,
    output: Path | None,
    csv: Path | None,
    track: str | None,
    follow: bool,
    figure: str | None,
    arm: tuple[str, ...],
    target: float | None,
    title: str | None,
    overwrite: bool,
    json: bool,
) -> None:
    """Report on RUN, the folder of a simulation, a fleet or a server, finished or not.

    Writes RUN/report.html, which needs no other file, and a PNG for each figure. Figures need matplotlib.
    """
    if sum(asked is not None for asked in (csv, figure, track)) > 1:
        raise click.UsageError("--csv, --figure, --track: expected one, found several; type one command for each")
    if follow and track is None:
        raise click.UsageError("--follow: expected with --track KIND:PLACE, found without")
    if figure is None and (arm or target is not None or title is not None):
        raise click.UsageError("--arm, --target, --title: expected with --figure NAME, found without")
    if track is not None:
        if output is not None:
            raise click.UsageError(f"--output: expected without --track, which names its place, found {output}")
        _track(run, track, follow=follow, overwrite=overwrite, json=json)
    elif csv is not None:
        if output is not None:
            raise click.UsageError(f"--output: expected without --csv, which names its file, found {output}")
        if csv == STDOUT and json:
            raise click.UsageError("--csv: expected a file beside --json, which has stdout to itself, found -")
        _write_table(run, csv, overwrite=overwrite, json=json)
    elif figure is not None:
        from fedpara_edge.report import write_figure

        if output is None:
            raise click.UsageError("--output: expected a file for the figure, found none; add -o FILE.svg")
        labels = {name: label or name for name, _, label in (text.partition("=") for text in arm)}
        write_figure(run, figure, output, arms=labels or None, target=target, title=title or "", overwrite=overwrite)
        emit({"run": run, "figure": output}, f"figure: {output}", as_json=json)
    else:
        _write_report(run, output, overwrite=overwrite, json=json)


def _write_report(run: Path, output: Path | None, *, overwrite: bool, json: bool) -> None:
    from fedpara_edge.report import write_report

    report = write_report(run, output, overwrite=overwrite)
    for line in (*report.notes, *filter(None, [report.left_out])):
        note(line)
    files = {"report": report.page, "figures": report.figures}
    result = {"run": run, **files, "notes": list(report.notes), "left_out": report.left_out}
    emit(result, f"report: {report.page}", as_json=json)


def _track(run: Path, tracker: str, *, follow: bool, overwrite: bool, json: bool) -> None:
    from fedpara_edge.report.results import read_arms
    from fedpara_edge.report.tracking import open_sink, track
    from fedpara_edge.simulation.folder import METRICS
    from fedpara_edge.storage.atomic import check_output, replacing_folder

    read_arms(run / METRICS)  # so that nothing is made for what can't be read
    kind, _, place = tracker.partition(":")
    rounds = 0
    if kind == "tensorboard" and place:  # which shows all that is in a folder, of other runs too
        check_output(Path(place), overwrite=overwrite, folder=True)
        with replacing_folder(Path(place)) as made:
            rounds = 0 if follow else track(run, open_sink(f"{kind}:{made}", run))
    if follow or not rounds:
        rounds = track(run, open_sink(tracker, run), follow=follow)
    emit(
        {"run": run, "tracker": kind, "place": place, "rounds": rounds},
        f"{counted(rounds, 'round')}: {place}",
        as_json=json,
    )


def _write_table(run: Path, csv: Path, *, overwrite: bool, json: bool) -> None:
    from fedpara_edge.report import read_metrics, to_csv
    from fedpara_edge.storage.atomic import check_output, replacing_file

    if csv == STDOUT:
        to_csv(read_metrics(run), sys.stdout)
        return
    check_output(csv, overwrite=overwrite)
    rows = read_metrics(run)
    with replacing_file(csv) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        to_csv(rows, file)
    columns = list(rows[0]) if rows else []
    result = {"run": run, "csv": csv, "rows": len(rows), "columns": columns}
    emit(result, f"{counted(len(rows), 'row')} of {counted(len(columns), 'column')}: {csv}", as_json=json)
