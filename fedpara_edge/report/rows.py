"""Everything that was measured as a table: one row for each arm, seed and round."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from fedpara_edge.report.results import Line, SeedRun, read_results

KEYS = ("arm", "seed", "round")
NESTED = ("ranks", "full_ranks", "rejections")
"""Measures and facts with a column for each entry."""
COUNTS = "rejections"
"""The one of them that counts: what it does not name is 0, not unknown."""


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read everything that a run has measured, as rows for a data frame.

    A row has the measures of its round and the facts about its arm, under the names that
    `fedpara_edge.simulation.metrics` gives them, and `total_bytes`: bytes that all participants sent and received from
    the first round to this one. What is nested there has a column for each entry, such as `ranks.conv2`. All rows have
    the same columns; what was not measured is None.

    Args:
        run: Run folder, with `plan.toml` and `metrics.jsonl`; the run may be unfinished.

    Returns:
        Rows by arm, in the order of the plan, then by seed and round.

    Raises:
        InputError: Plan or metrics are missing or damaged, or no arm has begun.

    For example, with pandas, the mean over the seeds of every arm's accuracy, by round:

        frame = pandas.DataFrame(read_metrics(Path("run")))
        frame.pivot_table("accuracy", index="round", columns="arm")
    """
    rows = [row for arm in read_results(run).arms for seed in arm.seeds for row in _rows(arm.name, seed)]
    found = dict.fromkeys(name for row in rows for name in row)
    columns = sorted(found, key=lambda name: name.partition(".")[0] in NESTED)
    return [{name: row.get(name, 0 if name.startswith(f"{COUNTS}.") else None) for name in columns} for row in rows]


def to_csv(rows: Sequence[Mapping[str, Any]], file: IO[str]) -> None:
    """Write rows that have the same columns as CSV (RFC 4180, but for the ends of lines); None is an empty cell."""
    writer = csv.DictWriter(file, rows[0] if rows else KEYS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def _rows(arm: str, seed: SeedRun) -> Iterator[dict[str, Any]]:
    sums = seed.total_bytes()
    facts = dict(_flat(seed.about))
    for number, line in sorted(seed.rounds.items()):
        measures = dict(_flat(line))
        first = {"arm": arm, "seed": seed.seed, "round": number, **measures, "total_bytes": sums.get(number)}
        yield first | {name: fact for name, fact in facts.items() if name not in first}


def _flat(line: Line) -> Iterable[tuple[str, Any]]:
    for name, value in line.items():
        if name in NESTED:
            yield from ((f"{name}.{key}", of) for key, of in (value or {}).items())
        elif name not in ("event", *KEYS):
            yield name, value
