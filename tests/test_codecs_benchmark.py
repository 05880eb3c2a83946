"""The benchmark of codecs runs, and its tables hold what they should."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedpara_edge.formats.codecbench import USUAL

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "codecs.py"


@pytest.mark.slow
def test_speed_and_aggregation(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    small = ["--parameters", "1", "--updates", "1", "--repetitions", "1", "--seconds", "0"]
    command = [sys.executable, SCRIPT, *small, "--part", "speed", "--part", "server", "--json", numbers]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stderr == ""
    results = json.loads(numbers.read_text())
    assert results["parameters"] > 500_000
    speed = {row["codec"]: row for row in results["speed"]}
    assert list(speed) == [*USUAL, "zstd -3", "astype(float16)"]
    assert all(min(row["encode_mb_per_s"], row["decode_mb_per_s"]) > 0 for row in speed.values())
    assert speed["uniform:step=2"]["bytes"] < speed["int4"]["bytes"] < speed["zstd -3"]["bytes"]
    server = {row["codec"]: row for row in results["server"]}
    assert server["float32"]["over_float32"] == 1
    assert all(row["seconds"] > 0 and row["peak_mib"] > 0 for row in server.values())
    assert server["int8"]["update_mb"] < server["int8:entropy=0"]["update_mb"] < server["float32"]["update_mb"] / 3
    assert "x float32" in done.stdout
