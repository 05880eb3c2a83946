"""Scripts run on this machine, on an emulated Pi and on a board, and what is expected of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
SECONDS = 900  # after which a device is taken to hang
MACHINES = {"arm64": "aarch64", "armhf": "armv7l"}

Run = Callable[[Path, str], None]
"""Run a script in a home, on some machine; afterwards the home holds what it wrote."""


def run_here(home: Path, text: str) -> None:
    """Run a script on this machine."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["sh", "-c", text], cwd=home, env={**os.environ, "PATH": path}, check=True)


def run_on_pi(userland: Path, device: Path, home: Path, text: str) -> None:
    """Run a script on the emulated Pi whose own files are in `device`."""
    disk = device / "disk" / "home"
    disk.mkdir(parents=True, exist_ok=True)
    home.rename(disk / "pi")
    command = ["sh", str(HERE / "device.sh"), str(userland), str(device), "/bin/sh", "-c", text]
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=SECONDS)
    finally:
        (disk / "pi").rename(home)
    # Not shown otherwise: Debian's onnxruntime greets with 567 lines of "Schema error" whatever it is to do.
    expect(
        not done.returncode, f"{home.name} to do all that it was told", f"exit code {done.returncode}: {done.stderr}"
    )


def run_on_board(board: Path, userland: Path, home: Path, text: str) -> None:
    """Run a script on a board that boots for it."""
    (home / "session.sh").write_text(text)
    subprocess.run(["sh", HERE / "boot.sh", board, userland, home], check=True)


def check_facts(home: Path, userland: Path) -> dict[str, Any]:
    """What a device said about itself, which is to be a Pi that can train and no more."""
    machine = MACHINES[(userland / "architecture").read_text().strip()]
    facts: dict[str, Any] = read_json(home / "facts.json")
    expect(facts["machine"] == machine, f"a machine of kind {machine}", facts["machine"])
    expect("Raspberry Pi" in facts["model"], "a Raspberry Pi", facts["model"])
    expect(facts["importable"] == ["fedpara_edge"], "fedpara_edge without torch and onnx", facts["importable"])
    say(f"{home.name}: {facts['model']}, {machine}, Python {facts['python']}, onnxruntime {facts['onnxruntime']}")
    return facts


def distance(found: Path, expected: Path) -> float:
    """Norm of the difference of two updates, in parts of the change that was expected."""
    tensors, others = load_file(found), load_file(expected)
    expect(tensors.keys() == others.keys(), "the same tensors", tensors.keys())
    change = sum(float(np.square(tensor, dtype=np.float64).sum()) for tensor in others.values())
    error = sum(float(np.square(tensors[name] - others[name], dtype=np.float64).sum()) for name in others)
    return float((error / change) ** 0.5)


def fedpara(folder: Path, arguments: str) -> str:
    """Run a command of this machine's, and return what it printed."""
    command = [sys.executable, "-m", "fedpara_edge", *arguments.split()]
    return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout


def read_json(path: Path) -> Any:
    """The value of a JSON file."""
    return json.loads(path.read_text())


def relative(found: list[float], expected: list[float]) -> float:
    """The largest difference of two lists, in parts of what was expected."""
    return float(np.max(np.abs(np.subtract(found, expected)) / np.abs(expected)))


def expect(holds: bool, expected: str, found: object) -> None:
    """End with a line that says so unless something holds."""
    if not holds:
        raise SystemExit(f"pi: expected {expected}, found {found}")


def say(text: str) -> None:
    """Tell how far this is."""
    print(f"pi: {text}", flush=True)


@contextmanager
def new_folder(userland: Path) -> Iterator[Path]:
    """A folder that is gone afterwards; a program that fails meanwhile ends this one with a line."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so remove the files
    try:
        with tempfile.TemporaryDirectory(dir=userland.parent, prefix="round-") as name:
            yield Path(name)
    except subprocess.SubprocessError as error:
        raise SystemExit(f"pi: {error}") from error
