"""All measurements of a run as a table, one row per arm, seed and round."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from fedpara_edge.report.results import ArmRun, Line, SeedRun, read_results

KEYS = ("arm", "seed", "round")
NESTED = ("ranks", "full_ranks", "rejections")
"""Nested measures and facts, which get one column per entry."""
COUNTS = "rejections"
"""The nested measure that counts: an entry that is missing is 0, not unknown."""


def read_metrics(run: Path | str) -> list[dict[str, Any]]:
    """Read all measurements of a run, as rows for a data frame.

    A row has the measures of a round and the facts about its arm, named as in `fedpara_edge.simulation.metrics`, and
    `total_bytes`: what all participants sent and received up to and including this round. Nested values get one column
    per entry, such as `ranks.conv2`. All rows have the same columns; None marks what was not measured.

    Args:
        run: Run folder, with `plan.toml` and `metrics.jsonl`; the run may be unfinished.

    Returns:
        Rows by arm in the order of the plan, then by seed and round.

    Raises:
        InputError: Plan or metrics are missing or damaged, or no arm has begun.

    With pandas, for example, the accuracy of every arm by round, averaged over the seeds:

        frame = pandas.DataFrame(read_metrics(Path("run")))
        frame.pivot_table("accuracy", index="round", columns="arm")
    """
    return rows_of(read_results(Path(run)).arms)


def rows_of(arms: Iterable[ArmRun]) -> list[dict[str, Any]]:
    """Rows of `read_metrics` of some arms."""
    rows = [row for arm in arms for seed in arm.seeds for row in _rows(arm.name, seed)]
    found = dict.fromkeys(name for row in rows for name in row)
    columns = sorted(found, key=lambda name: name.partition(".")[0] in NESTED)
    return [{name: row.get(name, 0 if name.startswith(f"{COUNTS}.") else None) for name in columns} for row in rows]


def to_csv(rows: Sequence[Mapping[str, Any]], file: IO[str]) -> None:
    """Write rows with the same columns as CSV, with a header; None is an empty cell."""
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
            nested = value if isinstance(value, dict) else {}
            yield from ((f"{name}.{key}", of) for key, of in nested.items())
        elif name not in ("event", *KEYS):
            yield name, value
