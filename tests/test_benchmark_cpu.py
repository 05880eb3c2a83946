"""CPU time of a tree of processes is found whether or not somebody waits for those that end."""

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

BURN = "import time\ndef burn(s):\n    t = time.process_time()\n    while time.process_time() - t < s: pass\n"
ENDS = {
    "waited for": "os.waitpid(pid, 0)",
    "ignored": "while os.path.exists(f'/proc/{pid}'): time.sleep(0.01)",
}
PROGRAM = """
import os, signal, sys
{burn}
if {ignored}: signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for _ in range(2):
    pid = os.fork()
    if not pid:
        burn(0.4)
        time.sleep(0.3)
        os._exit(0)
    {end}
    print("round", flush=True)
burn(0.2)
time.sleep(0.3)
"""


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    monkeypatch.delitem(sys.modules, "cpu", raising=False)
    return importlib.import_module("cpu")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", ENDS)
def test_what_ended_counts(how: str, cpu: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "log"
    text = PROGRAM.format(burn=BURN, end=ENDS[how], ignored=how == "ignored")
    with log.open("wb") as file, subprocess.Popen([sys.executable, "-c", f"{text}"], stdout=file) as process:
        tree = cpu.Tree(process.pid, with_root=False)
        with cpu.cpu_at_each(lambda: log.read_text().count("round"), tree) as moments:
            while process.poll() is None:
                time.sleep(0.05)
    first, second = moments
    assert 0.35 <= first <= 0.5
    assert 0.35 <= second - first <= 0.5
    whole = cpu.Tree(os.getpid())
    assert whole.sample() >= time.process_time() - 0.05


def test_nothing_is_found_of_what_is_not_there(cpu: ModuleType) -> None:
    assert cpu.Tree(1 << 30).sample() == 0
