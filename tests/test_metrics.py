"""Metrics: what their definitions say of all outputs at once, from counts of any parts."""

import numpy as np
import pytest

from fedpara_edge.metrics import COUNTERS, METRICS, SHARES, add_counts
from fedpara_edge.metrics.binary import count_binary
from fedpara_edge.metrics.classes import count_classes
from fedpara_edge.metrics.regression import sum_errors

GENERATOR = np.random.default_rng(0)
CLASSES = 12


def classes(examples=60, positions=(), of=CLASSES):
    outputs = GENERATOR.standard_normal((examples, of, *positions), np.float32)
    labels = GENERATOR.integers(0, of - 2, (examples, *positions))  # the last two classes have no label
    return outputs, labels


def yes_or_no(shape):
    return GENERATOR.standard_normal(shape, np.float32), GENERATOR.integers(0, 2, shape).astype(np.float32)


CASES = {
    "classes": ("classes", *classes()),
    "classes at positions": ("classes", *classes(20, (5,))),
    "classes of pixels": ("classes", *classes(6, (4, 3))),
    "yes or no": ("probabilities", *yes_or_no((50, 1))),
    "several answers": ("probabilities", *yes_or_no((50, 4))),
    "mask": ("probabilities", *yes_or_no((6, 2, 5, 5))),
    "numbers": ("numbers", *(GENERATOR.standard_normal((50, 3), np.float32) for _ in range(2))),
}


def defined(kind, outputs, labels):
    """Metrics by their definitions, in loops."""
    if kind == "numbers":
        error = np.float64(outputs) - labels
        return {"mae": np.abs(error).mean(), "rmse": np.sqrt((error**2).mean())}
    if kind == "classes":
        outputs = np.moveaxis(outputs, 1, -1).reshape(-1, outputs.shape[1])
        order = np.argsort(-outputs, axis=1, kind="stable")
        pairs = [(order[:, 0] == c, labels.ravel() == c) for c in range(outputs.shape[1])]
    else:
        flat = [np.moveaxis(array, 1, -1).reshape(-1, array.shape[1]) for array in (outputs > 0, labels > 0.5)]
        pairs = list(zip(flat[0].T, flat[1].T, strict=True))

    def mean(name):
        found = []
        for guess, truth in pairs:
            hits, either = (guess & truth).sum(), (guess | truth).sum()
            whole = {"recall": truth.sum(), "precision": guess.sum(), "iou": either, "f1": truth.sum() + guess.sum()}
            if whole[name]:
                found.append((2 if name == "f1" else 1) * hits / whole[name])
        return np.mean(found)

    if kind == "classes":
        top = {f"top{k}": (order[:, :k] == labels.ravel()[:, None]).any(axis=1).mean() for k in (3, 5, 10)}
        shares = {"macro_f1": mean("f1"), "macro_recall": mean("recall"), "mean_iou": mean("iou")}
        return {"accuracy": (order[:, 0] == labels.ravel()).mean(), **shares, **top}
    accuracy = np.mean([(guess == truth).mean() for guess, truth in pairs])
    return {"accuracy": accuracy, **{name: mean(name) for name in ("f1", "precision", "recall", "iou")}}


@pytest.mark.parametrize("case", CASES)
def test_metrics_are_what_their_definitions_say(case):
    kind, outputs, labels = CASES[case]
    found = COUNTERS[kind](outputs, labels).metrics()
    assert found == pytest.approx(defined(kind, outputs, labels), rel=1e-12)
    assert set(found) <= set(METRICS)
    assert all(0 <= value <= 1 for name, value in found.items() if name in SHARES)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 3, 50])
def test_counts_of_parts_add_up_to_those_of_the_whole(case, size):
    kind, outputs, labels = CASES[case]
    counts = {}
    for start in range(0, len(outputs), size):
        add_counts(counts, {"y": COUNTERS[kind](outputs[start : start + size], labels[start : start + size])})
    whole = COUNTERS[kind](outputs, labels)
    assert counts["y"].metrics() == pytest.approx(whole.metrics(), rel=1e-12)
    assert counts["y"].rows() == whole.rows()
    if kind == "classes":
        np.testing.assert_array_equal(counts["y"].confusion, whole.confusion)


def test_the_confusion_matrix_has_labels_in_rows():
    outputs = np.eye(3, dtype=np.float32)[[0, 0, 2, 1]]
    counts = count_classes(outputs, np.array([0, 1, 1, 1]))
    assert counts.confusion.tolist() == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert [row["labels"] for row in counts.rows()] == [1, 3, 0]
    assert counts.rows()[1]["recall"] == 1 / 3
    assert counts.rows()[2]["recall"] is None
    assert counts.rows()[2]["precision"] == 0


def test_top_k_orders_equal_outputs_as_the_prediction_does():
    outputs, labels = np.zeros((5, 5), np.float32), np.arange(5)
    counts = count_classes(outputs, labels)
    assert counts.metrics()["accuracy"] == 1 / 5
    assert counts.metrics()["top3"] == 3 / 5
    assert "top5" not in counts.metrics()


def test_labels_that_are_no_class_are_left_out():
    outputs, labels = classes()
    padded = np.where(np.arange(60) % 3, labels, -100)
    kept = np.arange(60) % 3 > 0
    assert count_classes(outputs, padded).metrics() == count_classes(outputs[kept], labels[kept]).metrics()
    assert count_classes(outputs, np.full(60, 255)).metrics() == {}


def test_many_classes_need_no_matrix():
    counts = count_classes(np.zeros((2, 50_000), np.float32), np.array([0, 49_999]))
    assert counts.confusion is None
    assert (counts + counts).metrics()["accuracy"] == 1 / 2


def test_a_single_answer_has_no_rows_and_undefined_metrics_are_left_out():
    counts = count_binary(np.full((4, 1), -1.0), np.zeros((4, 1)))
    assert counts.rows() == []
    assert counts.metrics() == {"accuracy": 1.0}
    assert count_binary(np.array([1.0, -1.0]), np.array([1.0, 1.0])).metrics()["recall"] == 0.5


def test_errors_are_summed_in_double_precision():
    outputs = np.full(1 << 20, 0.1, np.float32)
    assert sum_errors(outputs, np.zeros_like(outputs)).metrics()["mae"] == pytest.approx(
        float(np.float32(0.1)), rel=1e-12
    )
