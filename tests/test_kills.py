"""Commands that are killed or find the disk full: outputs are whole or as before, and the same command again completes.

A sample of what `make kills` tries; `kills.py` has the laws, and `written.py` the commands.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from disk_calls import can_watch
from kills import FAULTS
from written import CASES

from fedpara_edge.cli import COMMANDS, fedpara_edge

TESTS = Path(__file__).parent
SAMPLE = 4
NO_OUTPUT = {"evaluate", "push", "audit", "inspect", "invite", "doctor"}
"""Commands that write nothing."""
AGAIN = {"serve", "device"}
"""Commands that run until they are stopped; `test_serving.py`, `test_serving_http.py` and `test_agent.py` kill them."""
ONE_FILE = {"fold", "pull", "predict", "codec", "demo", "export", "data", "fleet", "advise"}
"""Commands that write by `replacing_file` or `replacing_folder`, as others here do, or in a run as `simulate` does.

What `fleet up` writes, `test_fleet.py` and `test_fleet_up.py` cut short."""


@pytest.mark.slow
@pytest.mark.skipif(not can_watch(), reason="needs seccomp user notifications, which Linux has since 5.5")
def test_after_any_fault_the_same_command_completes() -> None:
    # All faults in one process, as the files of a command, and what it makes undisturbed, serve them all.
    command = [sys.executable, TESTS / "kills.py", "--sample", str(SAMPLE)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    tried = {name: int(number) for name, number in re.findall(r"^([\w-]+): .* (\d+) faults tried", ended.stdout, re.M)}
    assert tried.keys() == CASES.keys()
    assert all(len(FAULTS) <= number <= SAMPLE * len(FAULTS) for number in tried.values()), tried


def test_every_command_that_writes_is_tried() -> None:
    tried = {case.command[0] for case in CASES.values()}
    assert tried | NO_OUTPUT | ONE_FILE | AGAIN == set(COMMANDS)
    assert not tried & (NO_OUTPUT | ONE_FILE | AGAIN)
    for name in NO_OUTPUT | AGAIN:
        command = fedpara_edge.get_command(None, name)  # type: ignore[arg-type]
        assert command is not None
        assert not any("--output" in parameter.opts for parameter in command.params)
