"""What `evaluate` and `predict` print of metrics: those that fit the labels, a table of the classes, JSON with all."""

import re
from pathlib import Path

import numpy as np
import pytest
from command_line import Command

from fedpara_edge.cli.scores import as_json, as_text, check_metrics
from fedpara_edge.errors import InputError
from fedpara_edge.formats.interface import ArraySpec
from fedpara_edge.metrics import COUNTERS

EVALUATE = ("evaluate", "bundle", "--data", "d.npz")


def counted(kind, outputs, labels):
    return {"y": COUNTERS[kind](np.asarray(outputs, np.float32), np.asarray(labels))}


def test_evaluate_prints_a_table_of_the_classes(run: Command, here: Path) -> None:  # noqa: ARG001
    first, second, _, header, *rows = run(*EVALUATE).out.splitlines()
    assert re.fullmatch(r"accuracy [\d.]+%, loss [\d.]+ on 8 examples.*", first)
    assert re.fullmatch(r"macro F1 [\d.]+%, macro recall [\d.]+%, top 3 [\d.]+%", second)
    assert re.split(r" {2,}", header) == [
        *("class", "labels", "recall", "precision", "F1", "as 0", "as 1", "as 2", "as 3", "as 4")
    ]
    cells = [row.split() for row in rows]
    assert [row[0] for row in cells] == ["0", "1", "2", "3", "4"]
    assert [int(row[1]) for row in cells] == [3, 3, 2, 0, 0]
    assert [sum(map(int, row[5:])) for row in cells] == [3, 3, 2, 0, 0]


def test_json_has_all_metrics(run: Command, here: Path) -> None:  # noqa: ARG001
    found = run(*EVALUATE, "--json", "--metric", "top3").json
    of_labels = found["labels"]["y"]
    assert of_labels["accuracy"] == found["accuracy"]
    assert {"macro_f1", "macro_recall", "mean_iou", "top3"} <= of_labels.keys()
    assert np.trace(of_labels["confusion"]) == round(8 * found["accuracy"])
    assert [row["labels"] for row in of_labels["classes"]] == [3, 3, 2, 0, 0]


def test_metrics_are_chosen(run: Command, here: Path) -> None:  # noqa: ARG001
    lines = run(*EVALUATE, "--metric", "macro_f1", "--metric", "top3").out.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"macro F1 [\d.]+%, top 3 [\d.]+%", lines[1])
    assert len(run(*EVALUATE, "--metric", "accuracy").out.splitlines()) == 1
    assert len(run(*EVALUATE, "--metric", "classes").out.splitlines()) == 1 + 1 + 6
    refused = run(*EVALUATE, "--metric", "mae")
    assert refused.code == 2
    assert re.match(
        r"Error: --metric: expected one of accuracy, .*, classes for these labels, found 'mae'", refused.err
    )


def test_clients_are_compared_by_the_metric_that_is_asked_for(run: Command, here: Path) -> None:  # noqa: ARG001
    text = run(*EVALUATE, "--data", "d.npz", "--metric", "macro_recall").out
    assert text.splitlines()[0].split() == ["client", "macro_recall", "examples"]
    assert "macro_recall of 2 clients: mean" in text
    found = run(*EVALUATE, "--data", "d.npz", "--json").json
    assert np.sum(found["labels"]["y"]["confusion"]) == 16
    assert "class" not in run(*EVALUATE, "--data", "d.npz").out


def test_regression_shows_errors_and_no_table() -> None:
    counts = counted("numbers", [[1.0], [3.0]], [[0.0], [0.0]])
    label = ArraySpec("y", (1,), "float32")
    assert as_text(counts, (label,)) == ["mean absolute error 2, root mean squared error 2.2361"]
    assert as_json(counts, (label,)) == {"y": {"mae": 2.0, "rmse": pytest.approx(5**0.5)}}


def test_segmentation_shows_the_intersection_over_the_union() -> None:
    labels = np.array([[[0, 1], [1, 1]]])
    counts = counted("classes", np.moveaxis(np.eye(2)[np.array([[[0, 1], [0, 1]]])], -1, 1), labels)
    at_pixels, of_image = ArraySpec("y", (2, 2), "int64", 2), ArraySpec("y", (), "int64", 2)
    assert "mean IoU 58.33%" in as_text(counts, (at_pixels,))[0]
    assert "IoU" not in as_text(counts, (of_image,))[0]


def test_yes_or_no_shows_f1() -> None:
    counts = counted("probabilities", [[1.0], [1.0], [-1.0]], [[1.0], [0.0], [0.0]])
    (line,) = as_text(counts, (ArraySpec("y", (1,), "float32"),))
    assert line == "F1 66.67%, precision 50.00%, recall 100.00%"


def test_of_many_classes_the_worst_are_shown() -> None:
    outputs = np.eye(30)
    outputs[7] = outputs[8]
    counts = counted("classes", outputs, np.arange(30))
    lines = as_text(counts, (ArraySpec("y", (), "int64", 30),))
    assert "10 of 30 classes, with the lowest recall:" in lines
    assert lines[4].split()[:2] == ["7", "1"]
    assert lines[-1] == "most often: 7 as 8 (1)"


def test_several_labels_are_told_apart() -> None:
    counts = {**counted("numbers", [1.0], [0.0]), "z": COUNTERS["numbers"](np.ones(1), np.ones(1))}
    lines = as_text(counts, (ArraySpec("y", (), "float32"), ArraySpec("z", (), "float32")))
    assert [line.partition(":")[0] for line in lines] == ["y", "z"]
    with pytest.raises(InputError, match="metric: expected one of mae, rmse, classes for these labels, found 'f1'"):
        check_metrics(["f1"], counts)
