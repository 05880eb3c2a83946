"""The metrics and the progress of a run, line by line, whatever the disk does to them."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from failing_disk import full_disk
from journal_lines import NEEDED

from fedpara_edge.cli import simulate as cli_simulate
from fedpara_edge.errors import FedparaError
from fedpara_edge.simulation.metrics import Journal


def test_sorted_lines_are_read_back_whole(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    for arm in ("b", "a"):
        who = {"arm": arm, "seed": 0}
        journal.append({"event": "arm", **who, **NEEDED["arm"]})
        for number in (1, 2):
            both = ("clients", "round")
            journal.append(*({"event": event, **who, "round": number, **NEEDED[event]} for event in both))
    journal.sort(["a", "b"], [0])
    assert [event["arm"] for event in journal.events] == ["a"] * 5 + ["b"] * 5
    assert Journal(tmp_path / "metrics.jsonl").events == journal.events


def test_what_could_not_be_appended_whole_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    journal, event = Journal(path), {"event": "arm", "arm": "a", "seed": 0, **NEEDED["arm"]}
    journal.append(event)
    refusal = r"metrics\.jsonl: expected to append to it, found No space left"
    with full_disk(), pytest.raises(FedparaError, match=refusal):
        journal.append(event | {"arm": "b"})
    assert path.read_text() == json.dumps(event) + "\n"
    journal.append(event | {"arm": "c"})
    assert Journal(path).events == journal.events == [event, event | {"arm": "c"}]


def test_a_measure_that_is_not_finite_is_null(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    event = {"event": "round", "arm": "a", "seed": 0, "round": 1, **NEEDED["round"]}
    journal.append({**event, "weight_norm": np.inf, "gap": 0.5, "loss": float("nan")})
    (event,) = Journal(tmp_path / "metrics.jsonl").events
    assert (event["weight_norm"], event["gap"], event["loss"]) == (None, 0.5, None)
    assert journal.events == [event]


def test_progress_in_a_log_is_a_line_now_and_then() -> None:
    stream = io.StringIO()
    now = iter([0.0, 10.0, 70.0, 100.0, 131.0])
    with cli_simulate._progress(stream, lambda: next(now)) as (on_start, on_trained):
        on_start(8)
        for _ in range(4):
            on_trained("dense, seed 0")
    assert stream.getvalue().splitlines() == [
        "training 2/8, 4 min left: dense, seed 0",
        "training 4/8, 2 min left: dense, seed 0",
    ]
