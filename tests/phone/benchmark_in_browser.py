"""The benchmark of the page measures what it says, here in its small form."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from phone_tools import PHONE, run_program
from source_tree import ROOT


def test_the_figures_of_the_page(tmp_path: Path) -> None:
    run_program("sh", PHONE / "browser.sh")
    numbers = tmp_path / "numbers.json"
    command = [sys.executable, ROOT / "benchmarks" / "phone.py", "--models", "mlp", "--repetitions", "1"]
    done = subprocess.run([*command, "--json", numbers], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 0
    start, steps, others = json.loads(numbers.read_text(encoding="utf-8"))["rows"]
    assert start["seconds"] > 0
    assert 1 < start["wasm_mb"] < start["wire_mb"] < 4
    assert steps["ratio"] == steps["ms"]["page"] / steps["ms"]["native"]
    assert min(start["page_mib"], steps["page_mib"]) > 30
    assert others["ms"].keys() == {"dense", "fedpara", "wasm", "cpu"}
    assert others["over"]["wasm"]["fedpara"] == others["ms"]["wasm"] / others["ms"]["fedpara"] > 1
