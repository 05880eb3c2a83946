"""The metrics of a run as rows for a data frame, and as a table in CSV."""

import csv
import io
from pathlib import Path

import pytest
from command_line import Command
from small_run import lines_of, write_metrics, write_plan, write_run

from fedpara_edge.report import read_metrics


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def test_metrics_are_rows_for_a_data_frame(run_folder: Path) -> None:
    rows = read_metrics(run_folder)
    assert [(row["arm"], row["seed"], row["round"]) for row in rows] == [
        (arm, seed, number) for arm in ("dense", "small") for seed in (0, 1) for number in range(1, 5)
    ]
    assert len({tuple(row) for row in rows}) == 1
    assert not [value for row in rows for value in row.values() if isinstance(value, dict | list)]
    last = rows[-1]
    assert last["accuracy"] == pytest.approx(0.61)
    assert (last["gap"], last["kind"], last["shared_parameters"]) == (0.04, "fedpara", 40)
    assert (last["ranks.c"], last["full_ranks.c"], rows[0]["ranks.c"]) == (4, 8, None)
    assert [row["total_bytes"] for row in rows[:4]] == [100, 200, 300, 400]
    assert not {"event", "ranks", "clients.client-0"} & last.keys()


def test_the_participants_of_a_round_go_before_the_arms_and_no_rejection_is_0(tmp_path: Path) -> None:
    write_plan(tmp_path, ["dense"])
    first, one, two, done = lines_of("dense", [0.1, 0.2], participants=4)
    write_metrics(
        tmp_path, [first, one | {"participants": 3, "rejections": {}}, two | {"rejections": {"shape": 2}}, done]
    )
    rows = read_metrics(tmp_path)
    assert [(row["participants"], row["rejections.shape"]) for row in rows] == [(3, 0), (2, 2)]


def test_the_table_of_metrics_is_csv(run: Command, run_folder: Path, tmp_path: Path) -> None:
    rows = read_metrics(run_folder)
    file = tmp_path / "metrics.csv"
    ended = run("report", run_folder, "--csv", file, "--json")
    assert (ended.json["rows"], ended.json["columns"]) == (16, list(rows[0]))
    text = file.read_text(encoding="utf-8")
    expected = [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]
    assert list(csv.DictReader(io.StringIO(text))) == expected
    assert run("report", run_folder, "--csv", "-").out == text
    assert "found an existing one" in run("report", run_folder, "--csv", file).err
    assert run("report", run_folder, "--csv", file, "--overwrite").code == 0
    assert not (run_folder / "report.html").exists()
