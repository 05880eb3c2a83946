"""What is installed: `doctor` tells it, and a command that lacks something says what to type."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from command_line import Command

from fedpara_edge import installation
from fedpara_edge.cli import COMMANDS, installed
from fedpara_edge.installation import install_line


@pytest.mark.slow
def test_doctor_names_every_command(run: Command) -> None:
    found = run("doctor", "--json").json["capabilities"]
    assert {command for entry in found.values() for command in entry["commands"]} == set(COMMANDS)
    assert all(entry["available"] for entry in found.values())
    assert "onnxruntime-training-cpu 1.19.2" in run("doctor").out


def test_doctor_gives_the_line_for_what_is_missing(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    without_distributions(monkeypatch, "torch")
    line = install_line("export", torch=True)
    assert f"missing torch: {line}" in run("doctor").out
    ended = run("export", "mlp", "-o", "unused")
    assert (ended.code, ended.err) == (
        2,
        f"Error: export: expected torch to be installed, found none; type: {line}\n",
    )


@pytest.mark.parametrize(
    ("command", "extra", "package"),
    [(("keys", "new", "mine"), "trust", "tuf"), (("fleet", "up", "app"), "fleet", "flwr")],
)
def test_without_an_extra_the_error_says_what_to_type(
    command: tuple[str, ...], extra: str, package: str, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_distributions(monkeypatch, package)
    ended = run(*command)
    assert ended.code == 2
    assert f"{extra}: expected {package} to be installed, found none; type: " in ended.err
    assert f"[{extra}]" in ended.err


def without_distributions(monkeypatch: pytest.MonkeyPatch, *absent: str) -> None:
    monkeypatch.setattr(installed, "_version", lambda name: None if name in absent else "1.0")
    monkeypatch.setattr(installed, "find_spec", lambda name: None if name in absent else find_spec(name))


TRAINING = ("onnxruntime-training-cpu", "onnxruntime-training")


def test_doctor_tells_the_engines_and_what_to_type_on_a_raspberry_pi(
    run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("doctor", "--json").json["engines"] == ["onnxruntime", "ort-training"]
    text = run("doctor").out
    assert "engines here: onnxruntime, ort-training" in text
    assert "on a Raspberry Pi, 64-bit: pip install -c constraints.txt '.[device]'" in text
    assert re.search(r"on a Raspberry Pi, 32-bit .*: sudo apt install python3-onnxruntime python3-numpy .*venv", text)
    without_distributions(monkeypatch, *TRAINING)
    found = run("doctor", "--json").json
    assert found["engines"] == ["onnxruntime"]
    assert found["capabilities"]["device"]["available"]
    assert found["capabilities"]["export"]["available"]


def test_export_writes_for_the_engines_that_are_installed(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_distributions(monkeypatch, *TRAINING)
    assert run("export", "mlp", "-o", tmp_path / "stock").code == 0
    assert run("inspect", tmp_path / "stock", "--json").json["engines"] == ["onnxruntime"]
    refused = run("export", "mlp", "-o", tmp_path / "none", "--engines", "ort-training")
    assert refused.code == 2
    assert re.match(r"Error: engine ort-training: expected onnxruntime-training-cpu to be installed", refused.err)


def test_an_onnxruntime_without_metadata_counts(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "_version", lambda _: None)
    found = run("doctor", "--json").json
    assert found["engines"] == ["onnxruntime"]
    assert found["capabilities"]["device"]["versions"] == {"onnxruntime": "of unknown version"}


@pytest.mark.parametrize(
    ("bits", "line"),
    [(64, "pip install -c .*\\[device\\]'"), (32, "32-bit systems: sudo apt install python3-onn")],
)
def test_a_device_without_onnxruntime_is_told_what_to_type(
    bits: int, line: str, run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_distributions(monkeypatch, "onnxruntime", *TRAINING)
    monkeypatch.setattr(installation, "POINTER_BITS", bits)
    monkeypatch.chdir(tmp_path)
    ended = run("train", "bundle", "--data", "device.npz", "-o", "out.safetensors")
    assert ended.code == 2
    assert re.match(f"Error: device: expected onnxruntime to be installed, found none; .*{line}", ended.err)
    assert re.search(f"no   device: train, evaluate, predict, device: missing onnxruntime: .*{line}", run("doctor").out)
    assert run("doctor", "--json").json["engines"] == []
    assert list(tmp_path.iterdir()) == []
