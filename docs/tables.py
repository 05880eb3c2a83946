"""Tables of `reproducing.md`, filled from the committed results of the plans, so that no number is typed.

    python docs/tables.py            # after a plan was run again
    python docs/tables.py --check    # exits with 1 if a table differs from the results

A table stands between `<!-- table: PLAN KIND [ARM,ARM,…] -->` and `<!-- end -->`. KIND is one of `KINDS`, and may end
in an accuracy to reach instead of those of the plan: `bytes@50` for 50 %.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import click

from fedpara_edge.report.comparison import arms_table, bytes_tables, clients_table, gap_table, time_table
from fedpara_edge.report.page import Table
from fedpara_edge.report.results import read_results
from fedpara_edge.report.summarizing import summarize
from fedpara_edge.report.summary import Summary

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reproducing.md"
RESULTS = (ROOT / "plans" / "results", ROOT / "plans" / "paper" / "results")
MARKED = re.compile(r"(<!-- table: (\S+) (\S+)(?: (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)
KINDS: dict[str, Callable[[Summary], Sequence[Table | None]]] = {
    "arms": lambda summary: [arms_table(summary)],
    "bytes": bytes_tables,
    "time": lambda summary: [time_table(summary)],
    "clients": lambda summary: [clients_table(summary)],
    "gap": lambda summary: [gap_table(summary)],
    "rounds": lambda summary: [rounds_table(summary)],
}


def rounds_table(summary: Summary) -> Table:
    """Accuracy after every evaluated round, of runs that are too long to be whole."""
    curves = {arm.name: arm.accuracy for arm in summary.arms if arm.accuracy is not None}
    rounds = sorted({int(number) for curve in curves.values() for number in curve.rounds})
    rows = []
    for name, curve in curves.items():
        known = dict(zip(curve.rounds, curve.mean, strict=True))
        rows.append((name, *(f"{100 * known[number]:.1f} %" if number in known else "" for number in rounds)))
    return Table(("after round", *map(str, rounds)), rows)


def filled(page: str) -> str:
    """Page with its tables made anew."""

    def table(match: re.Match[str]) -> str:
        begin, plan, kind, arms, end = match.groups()
        (run,) = (folder / plan for folder in RESULTS if (folder / plan).exists())
        summary = summarize(read_results(run))
        name, _, target = kind.partition("@")
        if target:
            summary = replace(summary, targets=(float(target) / 100,))
        tables = [found for found in KINDS[name](summary) if found is not None]
        chosen = arms.split(",") if arms else [arm.name for arm in summary.arms]
        return begin + "".join(f"\n{_markdown(found, chosen)}\n" for found in tables) + end

    return MARKED.sub(table, page)


def _markdown(table: Table, arms: Sequence[str]) -> str:
    rows = [row for row in table.rows if row[0] in arms]
    aligned = [":--", *("--:" for _ in table.header[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (table.header, aligned, *rows)) + "\n"


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; exit with 1 if a table would change.")
def main(check: bool) -> None:
    """Fill the tables of reproducing.md from plans/results, or check them."""
    page = PAGE.read_text(encoding="utf-8")
    new = filled(page)
    if check and new != page:
        raise click.ClickException(
            f"{PAGE}: expected the tables of plans/results, found others; run python docs/tables.py"
        )
    if not check:
        PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
