"""Metrics as they are printed: a line of those of all labels, a table of the classes, and JSON with all of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fedpara_edge.cli.output import table
from fedpara_edge.errors import InputError
from fedpara_edge.formats.interface import ArraySpec
from fedpara_edge.metrics import METRICS, SHARES, Counts
from fedpara_edge.metrics.classes import ClassCounts

TABLE = "classes"
"""Choice beside the metrics: the table of all classes."""
CHOICES = (*METRICS, TABLE)
OF_POSITIONS = frozenset({"mean_iou", "iou"})
"""Metrics that are printed only where an example has labels at several positions."""
MOST_ROWS = 20
"""Classes up to which a table has them all; of more, it has those of the lowest recall."""
MOST_CONFUSED = 12
"""Classes up to which the table shows which is taken for which."""
FEW = 10


def check_metrics(asked: Collection[str], counts: Mapping[str, Counts]) -> None:
    """Refuse metrics that no label has.

    Raises:
        InputError: One is unknown, or not of the labels there are.
    """
    there = {name for each in counts.values() for name in each.metrics()} | {TABLE}
    for name in asked:
        if name not in there:
            fitting = ", ".join(known for known in CHOICES if known in there)
            raise InputError(f"expected one of {fitting} for these labels, found {name!r}", key="metric")


def as_json(counts: Mapping[str, Counts], labels: Sequence[ArraySpec]) -> dict[str, Any]:
    """All metrics of each array of labels, by its name: of all its labels, of each class, and the confusion matrix."""
    found: dict[str, Any] = {}
    for label in labels:
        of_label = counts[label.name]
        rows = of_label.rows()
        found[label.name] = dict(of_label.metrics())
        if rows:
            names = _names(label, len(rows))
            found[label.name]["classes"] = [{"class": name, **row} for name, row in zip(names, rows, strict=True)]
        if isinstance(of_label, ClassCounts) and of_label.confusion is not None:
            found[label.name]["confusion"] = of_label.confusion.tolist()
    return found


def as_text(
    counts: Mapping[str, Counts], labels: Sequence[ArraySpec], *, asked: Sequence[str] = (), with_table: bool = True
) -> list[str]:
    """Lines with the metrics of each array of labels, and a table of its classes.

    Args:
        counts: Counts by the name of the array of labels.
        labels: Arrays of labels.
        asked: Metrics to print; none for those that fit.
        with_table: Whether the table of the classes is among what fits.
    """
    lines: list[str] = []
    for label in labels if counts else ():
        of_label = counts[label.name]
        shown = _shown(of_label, label, asked)
        if len(labels) == 1:
            shown.pop("accuracy", None)  # is that of all labels, which is printed with the loss
        of = f"{label.name}: " if len(labels) > 1 else ""
        if shown:
            lines.append(of + ", ".join(f"{METRICS[name]} {formatted(name, value)}" for name, value in shown.items()))
        if of_label.rows() and (TABLE in asked or (with_table and not asked)):
            lines += ["", *_table(of_label, label)]
    return lines


def formatted(name: str, value: float | None) -> str:
    """A metric as it is printed: a share in percent, another number as it is.

    >>> formatted("accuracy", 0.5), formatted("mae", 12.3456789), formatted("recall", None)
    ('50.00%', '12.346', '-')
    """
    if value is None:
        return "-"
    return f"{value:.2%}" if name in SHARES else f"{value:.5g}"


def _shown(counts: Counts, label: ArraySpec, asked: Sequence[str]) -> dict[str, float]:
    found = counts.metrics()
    if asked:
        return {name: found[name] for name in asked if name in found}
    of_one = not label.shape if label.classes is not None else len(label.shape) < 2
    return {name: value for name, value in found.items() if not (of_one and name in OF_POSITIONS)}


def _table(counts: Counts, label: ArraySpec) -> list[str]:
    """Table of the classes, or of those with the lowest recall and the pairs that are most often confused."""
    rows = counts.rows()
    confusion = counts.confusion if isinstance(counts, ClassCounts) else None
    numbers = [*range(len(rows))]
    if len(rows) > MOST_ROWS:
        numbers = sorted(numbers, key=lambda number: (rows[number]["recall"] is None, rows[number]["recall"] or 0))[
            :FEW
        ]
    matrix = confusion is not None and len(rows) <= MOST_CONFUSED
    header = ["class", "labels", "recall", "precision", "F1", *(f"as {number}" for number in numbers if matrix)]
    names = _names(label, len(rows))
    cells = []
    for number in numbers:
        row = rows[number]
        shares = [formatted(name, row[name]) for name in ("recall", "precision", "f1")]
        name = f"{number} {names[number]}" if names[number] != str(number) else names[number]
        taken_for = confusion[number].tolist() if confusion is not None and matrix else []
        cells.append((name, row["labels"], *shares, *taken_for))
    lines = table(header, cells).splitlines()
    if len(rows) > MOST_ROWS:
        lines.insert(0, f"{len(numbers)} of {len(rows)} classes, with the lowest recall:")
        if confusion is not None:
            lines += _most_confused(confusion, names)
    return lines


def _most_confused(confusion: Any, names: Sequence[str]) -> list[str]:
    """Line on the pairs of classes that are most often confused; none if there are none."""
    pairs = [
        (int(confusion[true, found]), names[true], names[found])
        for true in range(len(names))
        for found in range(len(names))
        if true != found and confusion[true, found]
    ]
    most = sorted(pairs, key=lambda pair: -pair[0])[: FEW // 2]
    listed = ", ".join(f"{true} as {found} ({count})" for count, true, found in most)
    return [f"most often: {listed}"] if most else []


def _names(label: ArraySpec, count: int) -> Sequence[str]:
    """Names of the classes; their numbers if they have none."""
    return label.class_names or [str(number) for number in range(count)]
