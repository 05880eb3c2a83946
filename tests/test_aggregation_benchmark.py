"""The benchmark of aggregation runs, cleans up, and compares what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "aggregation.py"


@pytest.mark.slow
def test_it_runs_and_leaves_nothing_but_its_numbers(tmp_path: Path) -> None:
    folder, numbers = tmp_path / "files", tmp_path / "numbers.json"
    folder.mkdir()
    options = ["--updates", "1", "3", "--parameters", "1", "--repetitions", "1", "--folder", folder, "--json", numbers]
    options += ["--rules", "median", "krum"]
    done = subprocess.run([sys.executable, SCRIPT, *options], check=True, capture_output=True, text=True)
    assert list(folder.iterdir()) == []
    assert done.stderr == ""
    results = json.loads(numbers.read_text())["results"]
    assert [result["updates"] for result in results] == [1, 3]
    for result in results:
        assert (
            result["seconds"].keys()
            == result["peak_mib"].keys()
            == {
                *("aggregate", "reads", "read_bytes"),
                *("median", "krum"),
            }
        )
        assert result["ratio_to_mean"].keys() == {"median", "krum"}
        assert result["ratio_to_reads"] > 0
        assert result["parameters"] > 500_000
    parts, table = done.stdout.splitlines()[:2], done.stdout.splitlines()[2:]
    assert [line.partition(" (")[0] for line in parts] == ["1 updates", "3 updates"]
    assert [line.split()[0] for line in table] == ["updates", "1", "3", "1", "1", "3", "3"]
