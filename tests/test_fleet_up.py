"""`fedpara-edge fleet up` with Flower's own programs: success, faults, and nothing that stays behind.

Each test starts a SuperLink and SuperNodes, which takes some seconds; so there are few of them, and each tries a lot.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from command_line import succeed
from fleet_grid import EXPORT
from tiny_plan import write_plan

from fedpara_edge.fleet.ports import LOOPBACK, free_ports

pytestmark = pytest.mark.slow

AROUND_BYTES = 4000
"""Most bytes of a message besides the files in it."""
SECONDS = 240.0
"""Patience on a machine that has much else to do."""
FREE_SECONDS = 10.0
"""Patience with ports of processes that have ended."""
INIT = "fleet init bundle --plan plan.toml --arm small -o app"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    succeed(place, EXPORT.split())
    return place / "bundle"


@pytest.fixture
def here(tmp_path: Path, model: Path) -> Iterator[Path]:
    """A folder with a bundle; nothing may run there in the end."""
    (tmp_path / "bundle").symlink_to(model)
    yield tmp_path
    left = processes(tmp_path)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def make_app(place: Path, rounds: int, **settings: object) -> None:
    write_plan(place, ("rounds = 2", f"rounds = {rounds}"))
    options = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    succeed(place, [*INIT.split(), *options])


def start(place: Path, *options: str, command: str = "up app") -> subprocess.Popen[str]:
    arguments = [sys.executable, "-m", "fedpara_edge", "fleet", *command.split(), *options]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(arguments, cwd=place, **streams)  # type: ignore[call-overload]


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=SECONDS)
    return process.returncode, out, err


def processes(place: Path) -> list[int]:
    """Processes that a command started in a folder has left there."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if (entry / "cwd").readlink() == place:
                    found.append(int(entry.name))
    return found


def rounds(place: Path) -> list[dict[str, Any]]:
    path = place / "app" / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == "round"]


def wait_until(condition: Any, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ports(place: Path) -> list[int]:
    logs = [path.read_text() for path in (place / "app" / "local" / "logs").glob("*.log")]
    return [int(port) for log in logs for port in re.findall(rf"running on https?://{re.escape(LOOPBACK)}:(\d+)", log)]


def wait_until_free(numbers: list[int]) -> None:
    """Wait for ports of processes that ended: threads of a killed one may outlive its folder for a moment."""

    def free() -> bool:
        for number in numbers:
            with socket.socket() as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    listener.bind((LOOPBACK, number))
                except OSError:
                    return False
        return True

    wait_until(free, seconds=FREE_SECONDS)


def test_rounds_with_tls_and_keys_send_the_updates_and_little_else(here: Path) -> None:
    make_app(here, rounds=2)
    data = here / "app" / "local" / "data" / "clients" / "client-1" / "train"
    (port,) = free_ports(1)
    server = start(here, "-n", "1", "--remote", "1", "--host", "localhost", "--port", str(port), "--secure")
    keys = here / "app" / "local" / "keys"
    wait_until(lambda: (keys / "device-0.pub").exists() or server.poll() is not None)
    options = ["--data", str(data), "--ca", str(keys / "ca.pem"), "--auth", str(keys / "device-0")]
    node = start(here, f"localhost:{port}", "--state", "state", *options, command="node")
    code, out, err = end(server)
    assert code == 0, err
    assert f"fedpara-edge fleet node localhost:{port} --data DATA --state STATE --ca ca.pem" in err
    node.send_signal(signal.SIGINT)
    assert end(node)[0] == 130
    assert [line.split()[:3] for line in out.splitlines()[1:3]] == [["1", "2", "0"], ["2", "2", "0"]]
    assert out.splitlines()[3].endswith("2 rounds, finished:completed")
    assert [event["accuracy"] is None for event in rounds(here)] == [False, False]
    log = (here / "app" / "local" / "logs" / "record.log").read_text()
    traffic = json.loads(log[log.index("{") :])["runs"][0]["network-traffic"]
    up_bytes = sum(event["up_bytes"] for event in rounds(here))
    down_bytes = sum(event["down_bytes"] for event in rounds(here))
    assert up_bytes < traffic["inbound-bytes"] < up_bytes + 4 * AROUND_BYTES
    assert traffic["outbound-bytes"] < down_bytes + 4 * AROUND_BYTES
    wait_until_free([port, *ports(here)])


def test_killed_it_leaves_nothing_and_goes_on_with_the_nodes_that_are_there(here: Path) -> None:
    make_app(here, rounds=4, round_seconds=6)
    (port,) = free_ports(1)
    options = ["-n", "1", "--remote", "1", "--host", LOOPBACK, "--port", str(port)]
    first = start(here, *options)
    data = here / "app" / "local" / "data" / "clients" / "client-1" / "train"
    wait_until(lambda: data.exists() or first.poll() is not None)
    (here / "device").mkdir()
    node = start(here / "device", f"{LOOPBACK}:{port}", "--data", str(data), "--state", "state", command="node")
    wait_until(lambda: rounds(here))
    first.kill()
    first.communicate()
    wait_until(lambda: not processes(here))
    wait_until_free([port])
    before = len(rounds(here))
    again = start(here, *options)
    wait_until(lambda: len(rounds(here)) > before or again.poll() is not None)
    log = (here / "app" / "local" / "logs" / "node-0.log").read_text()
    (pid,) = re.findall(r"Started server process \[(\d+)\]", log)
    os.kill(int(pid), signal.SIGKILL)
    code, _, err = end(again)
    assert code == 0, err
    assert "node-0: its SuperNode ended" in err
    assert [event["round"] for event in rounds(here)] == [1, 2, 3, 4]
    node.send_signal(signal.SIGINT)
    assert end(node)[0] == 130
    assert not processes(here / "device")
    wait_until_free([port, *ports(here)])


def test_a_killed_superlink_or_server_ends_in_one_line_and_each_round_counts_once(here: Path) -> None:
    make_app(here, rounds=8)
    for victim, expected in ((superlink_of, "superlink.log: expected a program that runs"), (server_app_of, "found")):
        before = len(rounds(here))
        running = start(here, "-n", "2")
        wait_until(lambda before=before: len(rounds(here)) > before)  # type: ignore[misc]
        os.kill(victim(here), signal.SIGKILL)
        code, _, err = end(running)  # of a server that was killed Flower hears after a minute
        assert code == 1, err
        assert expected in err.splitlines()[-1]
        assert "same command goes on" in err.splitlines()[-1]
        assert not processes(here)
        assert len(rounds(here)) < 8
    wait_until_free(ports(here))
    code, _, err = end(start(here, "-n", "2"))
    assert code == 0, err
    assert [event["round"] for event in rounds(here)] == [*range(1, 9)]
    assert [event["participants"] for event in rounds(here)] == [2] * 8


def superlink_of(place: Path) -> int:
    log = (place / "app" / "local" / "logs" / "superlink.log").read_text()
    return int(re.findall(r"Started server process \[(\d+)\]", log)[-1])


def server_app_of(place: Path) -> int:
    """The task of the SuperExec that runs the server."""
    log = place / "app" / "local" / "logs" / "server.log"
    parents = {
        pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in processes(place)
    }
    printing = {pid for pid in parents if Path(f"/proc/{pid}/fd/1").resolve() == log}
    (task,) = (pid for pid in printing if parents[pid] in printing)
    return task


def test_failed_or_interrupted_it_says_so_and_leaves_nothing(here: Path) -> None:
    make_app(here, rounds=50, min_updates=3)
    code, out, err = end(start(here, "-n", "2"))
    assert code == 4, err
    assert err.splitlines()[-1] == "Error: expected at least 3 valid updates, found 2"
    assert out == ""
    assert rounds(here) == []
    assert not processes(here)
    project = here / "app" / "pyproject.toml"
    project.write_text(project.read_text().replace("min-updates = 3", "min-updates = 1"))
    log = here / "app" / "local" / "logs" / "node-1.log"
    for stop, began in ((signal.SIGTERM, log.exists), (signal.SIGINT, lambda: rounds(here))):
        log.unlink(missing_ok=True)
        running = start(here, "-n", "2")
        wait_until(began)
        running.send_signal(stop)
        code, _, err = end(running)
        assert (code, err.splitlines()[-1]) == (130, "Error: interrupted")
        assert not processes(here)
    wait_until_free(ports(here))
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        listener.listen()
        port = listener.getsockname()[1]
        code, _, err = end(start(here, "--port", str(port)))
    assert (code, err) == (2, f"Error: --port: expected a free port, found {port} in use; choose another\n")
