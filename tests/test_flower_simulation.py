"""The same plan on Flower's simulation engine: what is measured is the same to the bit, and nothing stays behind."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from begun_run import begin_run
from flwr.app import Error, Message
from flwr.supercore.task_identity import TaskIdentity
from test_fleet_up import processes
from tiny_plan import measured, write_plan

from fedpara_edge.errors import DivergedError, FedparaError
from fedpara_edge.fleet.simulated import NodeExecutor, run_task
from fedpara_edge.simulation.runner import simulate

SECONDS = 300.0
"""Patience on a machine that has much else to do."""


class Grid:
    """A grid whose nodes do a task when its result is asked for.

    Args:
        error: What they answer in place of it.
    """

    def __init__(self, error: Error | None = None) -> None:
        self.calls: list[int] = []
        self.most_open = 0
        self._error, self._open = error, dict[str, Message]()

    def get_node_ids(self) -> list[int]:
        return [11, 22]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"m{len(self.calls)}"
            self._open[message.metadata.message_id] = message
            self.calls.append(message.metadata.dst_node_id)
        self.most_open = max(self.most_open, len(self._open))
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        asked = [self._open.pop(number) for number in list(message_ids)[:1]]
        return [run_task(each, None) if self._error is None else Message(self._error, reply_to=each) for each in asked]  # type: ignore[arg-type]


@pytest.fixture
def executor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NodeExecutor:
    for name, value in (("_task_id", 1), ("_run_id", 1), ("_node_id", 1)):
        monkeypatch.setattr(TaskIdentity, name, value)
    (tmp_path / "run").mkdir()
    return NodeExecutor(tmp_path / "run" / ".lock", at_once=3)


def serve(executor: NodeExecutor, grid: Any) -> Thread:
    thread = Thread(target=executor.serve, args=(grid, 2))
    thread.start()
    return thread


def double(number: int, client: str = "") -> int:
    if number == 13:
        raise DivergedError(f"{client}: too much")
    return 2 * number


def test_a_client_has_one_node_and_few_tasks_are_under_way(executor: NodeExecutor) -> None:
    grid = Grid()
    futures = [executor.submit(double, number, client="ab"[number % 2]) for number in range(10)]
    failing = executor.submit(double, 13, client="a")
    serving = serve(executor, grid)
    assert [future.result(SECONDS) for future in futures] == [2 * number for number in range(10)]
    with pytest.raises(DivergedError, match="a: too much"):
        failing.result(SECONDS)
    executor.close()
    serving.join()
    assert grid.most_open == 3
    assert grid.calls == [*[11, 22] * 5, 11]


def test_nobody_waits_for_a_simulation_that_has_ended(executor: NodeExecutor) -> None:
    serving = serve(executor, Grid(Error(code=0, reason="an actor died")))
    with pytest.raises(FedparaError, match="an actor died"):
        executor.submit(double, 1).result(SECONDS)
    executor.close()
    serving.join()
    with pytest.raises(FedparaError, match="an actor died"):
        executor.submit(double, 1)


def start(plan: Path, run: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fedpara_edge", "simulate", str(plan), "-o", str(run), "--engine", "flower"]
    return subprocess.Popen(command, cwd=plan.parent, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_flower_measures_the_same_and_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    plan = write_plan(
        tmp_path,
        ("rounds = 2", "rounds = 4"),
        ("[data]", "[devices]\ndropout = 0.4\nslowest = 4.0\ndeadline = 1.2\n[data]"),
        ("participants = 2\n", ""),
    )
    plan.write_text(plan.read_text().replace('[arms.dense]\nmodel.kind = "dense"\n', ""))
    begin_run(plan, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "flower")
    simulate(plan, tmp_path / "run")

    with start(plan, tmp_path / "flower") as begun:
        deadline = time.monotonic() + SECONDS
        while begun.poll() is None and '"round"' not in _text(tmp_path / "flower" / "metrics.jsonl"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        begun.send_signal(signal.SIGINT)
        _, err = begun.communicate(timeout=SECONDS)
        assert begun.returncode == 130, err
    with start(plan, tmp_path / "flower") as again:
        _, err = again.communicate(timeout=SECONDS)
        assert again.returncode == 0, err
    assert measured(tmp_path / "flower") == measured(tmp_path / "run")
    assert not processes(tmp_path)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
