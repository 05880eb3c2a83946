"""Metrics of a run in TensorBoard's event files, read back as TensorBoard reads them."""

from __future__ import annotations

import struct
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from command_line import Command
from tensorboardX.proto.event_pb2 import Event
from test_report import full_lines, write_metrics, write_plan

from fedpara_edge.report import read_metrics, tracking
from fedpara_edge.report.tracking import TensorBoard, track


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
    ended = run("report", finished, "--tensorboard", tmp_path / "board")
    assert (ended.code, ended.out) == (0, f"16 rounds: {tmp_path / 'board'}\n")
    for row in read_metrics(finished):
        found = scalars(tmp_path / "board" / row["arm"] / f"seed-{row['seed']}")
        assert found["accuracy"][row["round"]] == pytest.approx(row["accuracy"])
        assert found["total_bytes"][row["round"]] == row["total_bytes"]
        if row["ranks.c"] is not None:
            assert found["ranks.c"][row["round"]] == row["ranks.c"]
        assert "local_only" not in found
    assert run("report", finished, "--tensorboard", tmp_path / "board").code == 7
    assert run("report", finished, "--tensorboard", tmp_path / "board", "--overwrite").code == 0
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
        TensorBoard(tmp_path)
