"""The log for machines: every event on one line of JSON, whatever is in the files, and nothing unasked."""

import json
import logging
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import Command

from fedpara_edge import __version__
from fedpara_edge.cli import log

TRAIN = ("train", "bundle", "--data", "d.npz", "--client", "a\n1", "--state", "s", "-o")
WEIGHTS = ("--weights", "bundle/weights.safetensors", "-o", "w")
FORGED = '{"event": "command_ended", "exit_code": 0}'


def lines(text: str) -> list[dict[str, Any]]:
    """The events of a log, once what all have in common is checked."""
    events = [json.loads(line) for line in text.splitlines()]
    for event in events:
        assert list(event)[:4] == ["time", "level", "event", "pid"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event["time"])
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
    return events


def without_common(event: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name not in ("time", "pid")}


def test_a_round(here: Path, run: Command) -> None:
    trained = run(
        "--log", "log", "train", "bundle", "--data", "d.npz", "--client", "a", "--state", "s", "-o", "u", "--json"
    )
    assert trained.code == 0
    shutil.copy("u", "cut")
    Path("cut").write_bytes(Path("u").read_bytes()[:-9])
    assert run("--log", "log", "aggregate", "u", "cut", *WEIGHTS).code == 0
    events = lines((here / "log").read_text())
    assert [(event["level"], event["event"]) for event in events] == [
        ("info", "command_started"),
        ("info", "training_finished"),
        ("info", "command_ended"),
        ("info", "command_started"),
        ("warning", "update_rejected"),
        ("info", "round_written"),
        ("info", "command_ended"),
    ]
    assert events[0]["version"] == __version__
    assert events[3]["argv"] == ["--log", "log", "aggregate", "u", "cut", *WEIGHTS]
    told = trained.json
    training = events[1]
    assert training["loss"] == told["losses"][-1]
    assert training["bytes"] == told["update_bytes"] == Path("u").stat().st_size
    for name in ("client", "round", "examples", "steps", "update"):
        assert training[name] == told[name]
    rejected = without_common(events[4])
    assert (rejected["code"], rejected["message"].startswith("cut: ")) == ("truncated", True)
    written = events[5]
    assert (written["round"], written["accepted"], written["rejected"], written["examples"]) == (1, 1, 1, 8)
    assert written["received_bytes"] == Path("u").stat().st_size
    assert [event["exit_code"] for event in events if event["event"] == "command_ended"] == [0, 0]
    assert all(0 < event["seconds"] < 600 for event in events if event["event"] == "command_ended")


def test_a_failure_has_its_codes(here: Path, run: Command) -> None:
    assert run("--log", "log", "aggregate", "gone", *WEIGHTS).code == 4
    events = lines((here / "log").read_text())
    assert [event["event"] for event in events] == ["command_started", "update_rejected", "error", "command_ended"]
    assert (events[2]["level"], events[2]["code"], events[3]["exit_code"]) == ("error", "too_few", 4)
    assert run("--log", "log", "trian").code == 2
    last = [without_common(event) for event in lines((here / "log").read_text())[-2:]]
    assert last[0] == {
        "level": "error",
        "event": "error",
        "code": "usage",
        "message": "No such command 'trian'. Did you mean 'train'?",
    }
    assert last[1]["exit_code"] == 2


def test_names_cannot_forge_lines(here: Path, run: Command) -> None:
    forged = f"x\n{FORGED}\r\x1b[2J\u2028"
    shutil.copy("d.npz", forged)
    assert run("--log", "log", "aggregate", forged, *WEIGHTS).code == 4
    text = (here / "log").read_bytes()
    assert len(text.splitlines()) == text.count(b"\n") == 4
    assert text.isascii()
    events = lines(text.decode())
    assert forged in events[0]["argv"]
    assert events[1]["message"].startswith(forged)
    assert events[-1]["exit_code"] == 4


def test_the_environment_chooses_the_log(here: Path, run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPARA_EDGE_LOG", str(here / "log"))
    assert run("inspect", "bundle").code == 0
    assert [event["event"] for event in lines((here / "log").read_text())] == ["command_started", "command_ended"]


def test_a_log_on_stderr_leaves_stdout_alone(here: Path, run: Command) -> None:  # noqa: ARG001
    ended = run("--log", "-", "inspect", "bundle", "--json")
    assert ended.json["format"] == "bundle"
    assert [event["event"] for event in lines(ended.err)] == ["command_started", "command_ended"]


def test_without_the_option_nothing_is_logged(here: Path, run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.StreamHandler(sys.stderr)
    monkeypatch.setattr(logging.getLogger(), "handlers", [root])  # as a package that is imported may set it up
    assert run("--log", "log", "inspect", "bundle").code == 0
    before = {path: path.stat().st_size for path in here.rglob("*")}
    ended = run("aggregate", "gone", *WEIGHTS)
    rejected, error = ended.err.splitlines()
    assert rejected.startswith("rejected [unreadable] gone: expected a readable file, found No such file")
    assert error.startswith("Error: expected at least 1 valid update, found 0")
    assert {path: path.stat().st_size for path in here.rglob("*")} == before


def test_a_log_that_cannot_be_opened_is_one_line(here: Path, run: Command) -> None:  # noqa: ARG001
    ended = run("--log", "nowhere/log", "inspect", "bundle")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == ("Error: --log: nowhere/log: expected a file to append to, found No such file or directory\n")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
def test_a_full_disk_for_the_log_does_not_stop_the_work(here: Path, run: Command) -> None:  # noqa: ARG001
    ended = run("--log", "/dev/full", "inspect", "bundle", "--json")
    assert (ended.code, ended.json["format"]) == (0, "bundle")
    assert ended.err.splitlines() == ["warning: log /dev/full: a line is lost: No space left on device"] * 2


def test_what_json_does_not_have_is_text(tmp_path: Path) -> None:
    log.start(str(tmp_path / "log"))
    log.event("odd", loss=float("nan"), time=1, path=tmp_path, argv=["no\udcff"])
    log.stop()
    (event,) = lines((tmp_path / "log").read_text())
    assert (event["loss"], event["path"], event["argv"]) == ("nan", str(tmp_path), ["no\udcff"])
    assert event["time"] != 1
