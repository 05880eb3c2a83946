"""Metrics of a run in TensorBoard's event files, read back as TensorBoard reads them."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from command_line import Command
from small_run import full_lines, write_metrics, write_plan
from tensorboardX.proto.event_pb2 import Event

from fedpara_edge.report import read_metrics, tracking
from fedpara_edge.report.tracking import TensorBoard, track

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    write_plan(run, ["dense", "small"], seeds=[0, 1])
    write_metrics(run, [line for arm in ("dense", "small") for seed in (0, 1) for line in full_lines(arm, seed)])
    return run


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Values by tag and step, of the records of all event files of a folder."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("events.*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (size,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + size])
            at += 12 + size + 4
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_tensorboard_has_every_number_of_every_round(finished: Path, tmp_path: Path, run: Command) -> None:
    ended = run("report", finished, "--track", f"tensorboard:{tmp_path / 'board'}")
    assert (ended.code, ended.out) == (0, f"16 rounds: {tmp_path / 'board'}\n")
    for row in read_metrics(finished):
        found = scalars(tmp_path / "board" / row["arm"] / f"seed-{row['seed']}")
        assert found["accuracy"][row["round"]] == pytest.approx(row["accuracy"])
        assert found["total_bytes"][row["round"]] == row["total_bytes"]
        if row["ranks.c"] is not None:
            assert found["ranks.c"][row["round"]] == row["ranks.c"]
        assert "local_only" not in found
    assert run("report", finished, "--track", f"tensorboard:{tmp_path / 'board'}").code == 7
    assert run("report", finished, "--track", f"tensorboard:{tmp_path / 'board'}", "--overwrite").code == 0
    assert len(scalars(tmp_path / "board" / "dense" / "seed-0")["accuracy"]) == 4


class Memory:
    """A sink that keeps what it is given, and interrupts when it has enough."""

    def __init__(self, enough: int, run: Path) -> None:
        self.given: list[tuple[str, int]] = []
        self.closed = False
        self._enough, self._run = enough, run

    def write(self, series: str, round: int, values: Mapping[str, float]) -> None:
        assert 0 < values["accuracy"] < 1
        self.given.append((series, round))
        if len(self.given) == 2:
            write_metrics(self._run, full_lines("dense", 0))
        if len(self.given) == self._enough:
            raise KeyboardInterrupt

    def close(self) -> None:
        self.closed = True


def test_a_run_is_followed_and_no_round_given_twice(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "POLL_SECONDS", 0.001)
    write_metrics(finished, full_lines("dense", 0)[:3])
    sink = Memory(4, finished)
    with pytest.raises(KeyboardInterrupt):
        track(finished, sink, follow=True)
    assert sink.given == [("dense/seed-0", number) for number in (1, 2, 3, 4)]
    assert sink.closed


def test_what_is_not_installed_is_named_with_the_line_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(tracking.InputError, match=r"pip install .*\[tracking\]"):
        TensorBoard(str(tmp_path), "run")


@pytest.mark.slow
def test_mlflow_has_every_number_of_every_round(finished: Path, tmp_path: Path, run: Command) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    ended = run("report", finished, "--track", f"mlflow:{tmp_path / 'ml'}")
    assert (ended.code, ended.out) == (0, f"16 rounds: {tmp_path / 'ml'}\n"), ended.err
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'ml'}")
    experiment = client.get_experiment_by_name("run")
    runs = {each.info.run_name: each for each in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {f"{arm}/seed-{seed}" for arm in ("dense", "small") for seed in (0, 1)}
    assert {each.info.status for each in runs.values()} == {"FINISHED"}
    for row in read_metrics(finished):
        of = runs[f"{row['arm']}/seed-{row['seed']}"].info.run_id
        found = {metric.step: metric.value for metric in client.get_metric_history(of, "accuracy")}
        assert found[row["round"]] == pytest.approx(row["accuracy"])


@pytest.mark.slow
def test_wandb_has_every_number_of_every_round(
    finished: Path, tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="needs the extra wandb")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    ended = run("report", finished, "--track", f"wandb:{tmp_path / 'wb'}")
    assert (ended.code, ended.out) == (0, f"16 rounds: {tmp_path / 'wb'}\n"), ended.err
    wandb.teardown()  # as where the command's process ends: until then its service may still write
    found = offline_runs(tmp_path / "wb")
    for row in read_metrics(finished):
        assert found[f"{row['arm']}/seed-{row['seed']}"][row["round"]]["accuracy"] == pytest.approx(row["accuracy"])


def offline_runs(folder: Path) -> dict[str, dict[int, dict[str, float]]]:
    """Numbers by step, by the name of the run, of what `wandb sync` would send."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = {}
    for path in folder.rglob("*.wandb"):
        steps, name = {}, ""
        for content in records(path.read_bytes()):
            record = Record.FromString(content)
            name = record.run.display_name or name
            if record.HasField("history"):
                items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                steps[record.history.step.num] = {key: json.loads(value) for key, value in items.items()}
        found[name] = steps
    return found


def records(content: bytes) -> Iterator[bytes]:
    """Records of a log in LevelDB's format, behind a header of 7 bytes."""
    at, whole = 7, b""
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = struct.unpack_from("<HB", content, at + 4)
        whole += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part of one
            yield whole
            whole = b""


def test_a_run_without_a_plan_is_tracked_too(finished: Path, tmp_path: Path, run: Command) -> None:
    (finished / "plan.toml").unlink()
    assert run("report", finished, "--track", f"tensorboard:{tmp_path / 'board'}").code == 0
    assert len(scalars(tmp_path / "board" / "dense" / "seed-0")["accuracy"]) == 4


@pytest.mark.parametrize("tracker", ["tensorboard", "tensorboard:", "comet:board"])
def test_an_unknown_tracker_or_none_is_refused(finished: Path, run: Command, tracker: str) -> None:
    ended = run("report", finished, "--track", tracker)
    assert (ended.code, "--track: expected one of tensorboard, mlflow, wandb" in ended.err) == (2, True)


def test_the_former_spelling_names_the_new_one(finished: Path, run: Command) -> None:
    assert "--tensorboard is now --track tensorboard:FOLDER" in run("report", finished, "--tensorboard", "b").err


PLACES: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a file": Path.touch,
    "a folder": Path.mkdir,
    "no database": lambda path: path.write_text("\x1b[2J and so on\n" * 99),
}


GOOD = {("mlflow", "a file"), ("wandb", "a folder")}


@pytest.mark.parametrize(
    ("tracker", "found"),
    [
        (tracker, found)
        for tracker in ("tensorboard", "mlflow", "wandb")
        for found in PLACES
        if (tracker, found) not in GOOD
    ],
)
def test_a_place_of_another_kind_is_refused_in_one_line(
    tracker: str, found: str, finished: Path, tmp_path: Path, run: Command
) -> None:
    PLACES[found](tmp_path / "place")
    ended = run("report", finished, "--track", f"{tracker}:{tmp_path / 'place'}")
    assert ended.code == (7 if (tracker, found) == ("tensorboard", "a folder") else 2)
    (line,) = ended.err.splitlines()
    assert line.startswith("Error: ")
    assert "expected" in line
    assert line.isprintable()


@pytest.mark.parametrize("tracker", ["tensorboard", "mlflow", "wandb"])
def test_nothing_is_made_for_a_run_that_can_not_be_read(tracker: str, tmp_path: Path, run: Command) -> None:
    (tmp_path / "run").mkdir()
    ended = run("report", tmp_path / "run", "--track", f"{tracker}:{tmp_path / 'place'}")
    assert (ended.code, ended.err.count("expected the metrics of a run, found ")) == (2, 1)
    assert not (tmp_path / "place").exists()
