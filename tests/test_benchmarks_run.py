"""The benchmarks of what the exporter chooses run, find every lowering right, and measure what is chosen."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script: str, numbers: Path, *options: str) -> list[dict[str, Any]]:
    command = [sys.executable, BENCHMARKS / script, *options, "--threads", "1", "--repetitions", "1", "--json", numbers]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stderr == ""
    rows: list[dict[str, Any]] = json.loads(numbers.read_text())["rows"]
    return rows


def rows_of(script: str, numbers: Path, *options: str) -> list[dict[str, Any]]:
    rows = run(script, numbers, *options)
    for row in rows:
        assert row["chosen"] in row["ms"]
        assert min(row["ms"].values()) > 0
    return rows


def test_lowerings(tmp_path: Path) -> None:
    rows = rows_of("lowerings.py", tmp_path / "numbers.json", "--layers", "cnn *1", "--batch", "2")
    assert [row["layer"] for row in rows] == ["cnn conv1"] * 3 + ["cnn pool1", "cnn relu1", "cnn norm1"]
    assert all(len(row["ms"]) > 2 and "torch" in row["ms"] for row in rows)


def test_lowerings_of_a_convolution_on_small_images(tmp_path: Path) -> None:
    *_, whole = rows_of("lowerings.py", tmp_path / "numbers.json", "--layers", "cnn conv4", "--batch", "2")
    assert whole["table"] == "convolution with both gradients"
    assert whole["ms"].keys() == {"Conv", "Winograd", "torch"}


def test_a_profile_of_a_step_names_its_operators_and_its_limit() -> None:
    command = [sys.executable, BENCHMARKS / "device.py", "--profile", "--models", "mlp", "--repetitions", "2"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stderr == ""
    for threads in (1, 2):
        assert re.search(rf"mlp, {threads} threads: \d+ nodes, [\d.]+ ms; limit [\d.]+ ms, 0.00 of it", done.stdout)
    assert re.search(r"\nGemm +\d+ +[\d.]+ +[\d.]+%\n", done.stdout)


def test_an_earlier_exporter(tmp_path: Path) -> None:
    before = re.search(r'^BEFORE = "(\w+)"$', (BENCHMARKS / "earlier.py").read_text(), flags=re.MULTILINE)
    assert before
    known = ["git", "-C", str(BENCHMARKS), "cat-file", "-e", before[1]]
    if subprocess.run(known, check=False, capture_output=True).returncode:
        pytest.skip("this is no checkout with its whole history")
    (row,) = run("earlier.py", tmp_path / "numbers.json", "--models", "mlp")
    for name in ("earlier", "today"):
        assert row["outside Conv"][name] > row["outside products"][name] > 0
    assert row["nodes"]["earlier"] != row["nodes"]["today"]


def test_forms(tmp_path: Path) -> None:
    row, choice = run("forms.py", tmp_path / "numbers.json", "--models", "cnn")
    (turn,) = row["turns"]
    assert turn.keys() == {"default", "direct"}
    assert min(turn.values()) > 0
    assert choice["form"] in turn
    assert 0 < choice["chosen"] <= choice["usual"]


def test_contraction(tmp_path: Path) -> None:
    options = ["--layers", "16x12", "--ranks", "2", "--kinds", "lowrank", "--batches", "3"]
    (row,) = rows_of("contraction.py", tmp_path / "numbers.json", *options)
    assert row["ms"].keys() == row["predicted_ms"].keys() == {"composed", "contracted"}
    assert row["chosen_over_faster"] >= 1


def test_freezing(tmp_path: Path) -> None:
    rows = run("freezing.py", tmp_path / "numbers.json", "--models", "mlp")
    assert [row["engine"] for row in rows] == ["ort-training", "onnxruntime"]
    for row in rows:
        assert row["update"] < 0.02
        assert row["time"] < 0.9
        assert row["memory"] < 1


def test_mobile(tmp_path: Path) -> None:
    (row,) = run("mobile.py", tmp_path / "numbers.json", "--models", "DS-CNN")
    assert row["over_torch"] == row["ms"]["onnxruntime fedpara"] / row["ms"]["torch fedpara"]
    assert min(row["ms"].values()) > 0


def test_signatures(tmp_path: Path) -> None:
    options = ["--codec", "int4", "--updates", "2", "--parameters", "1", "--repetitions", "1", "--folder", tmp_path]
    command = [sys.executable, BENCHMARKS / "signatures.py", *options, "--json", tmp_path / "numbers.json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    (row,) = json.loads((tmp_path / "numbers.json").read_text())["rows"]
    assert row["ratios"].keys() == {"bounds", "signed", "both", "least", "disk signed"}
    assert row["ratios"]["both"] == row["seconds"]["both"] / row["seconds"]["plain"]
    assert done.stdout.splitlines()[-1].startswith("int4 ")
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.json"]


def test_digests(tmp_path: Path) -> None:
    options = ["--updates", "2", "--parameters", "1", "--repetitions", "1", "--folder", tmp_path]
    command = [sys.executable, BENCHMARKS / "digests.py", *options, "--json", tmp_path / "numbers.json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads((tmp_path / "numbers.json").read_text())
    sums = ["2 float32 with sums", "2 int8 with sums"]
    assert list(found) == ["weights", "server state", *sums, "2 float32", "2 int8"]
    assert all(min(result["seconds"].values()) > 0 for result in found.values())
    assert done.stdout.splitlines()[-1].startswith("2 int8 ")
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.json"]


def test_starting(tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "starting.py", "--repetitions", "1", "--json", tmp_path / "numbers.json"]
    subprocess.run(command, check=True, capture_output=True)
    starts = json.loads((tmp_path / "numbers.json").read_text())["starts"]
    assert list(starts) == ["help", "aggregate", "train"]
    for found in starts.values():
        assert found["ratio"] == found["seconds"]["start"] / found["seconds"]["import"]
        assert found["longest_ms"]
    assert "fedpara_edge.aggregation" in starts["aggregate"]["longest_ms"]


def test_simulating(tmp_path: Path) -> None:
    options = ["--clients", "3", "--images", "96", "--rounds", "3", "--turns", "2", "--json", tmp_path / "numbers.json"]
    command = [sys.executable, BENCHMARKS / "simulating.py", *options]
    subprocess.run(command, check=True, capture_output=True)
    (row,) = json.loads((tmp_path / "numbers.json").read_text())["rows"]
    assert row["torch_over_simulation"] == row["seconds"]["torch"] / row["seconds"]["simulation"]
    assert 0 < row["training"] < 1


def test_serving(tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "serving.py", "--devices", "5", "--rounds", "2"]
    subprocess.run([*command, "--json", tmp_path / "numbers.json"], check=True, capture_output=True)
    (row,) = json.loads((tmp_path / "numbers.json").read_text())["rows"]
    assert (row["devices"], row["errors"], len(row["mib"])) == (5, 0, 3)
    assert row["request_ms"] <= row["request_ms_99"]


def test_exporting(tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "exporting.py", "--models", "cnn", "--repetitions", "1"]
    subprocess.run([*command, "--json", tmp_path / "numbers.json"], check=True, capture_output=True)
    (row,) = json.loads((tmp_path / "numbers.json").read_text())["rows"]
    assert row["model"] == "cnn"
    assert row["ratio"] > 1
    assert min(row["peak_mb"].values()) > 100
