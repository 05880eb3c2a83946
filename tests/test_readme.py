"""The README's examples run as printed: each command succeeds and prints the lines shown, up to their numbers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(python|console)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def masked(text: str) -> list[str]:
    """Lines with every hash and number replaced and the white space of tables folded."""
    without_hashes = re.sub(r"\b[0-9a-f]{64}\b", "#", text.strip())
    return [re.sub(r"[-+]?[\d.,]+(e-?\d+)?%?", "#", re.sub(r" +", " ", line)) for line in without_hashes.splitlines()]


def commands(block: str) -> list[tuple[str, str]]:
    """Each `$ command` with the output below it."""
    parts = re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
    pairs = [part.replace("\\\n", " ").partition("\n") for part in parts]
    return [(command, output) for command, _, output in pairs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which the checkout's `fedpara_edge` and `examples` are visible."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("fedpara_edge", "examples"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def test_the_session_runs_as_printed(folder: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    shown = 0
    for language, block in BLOCKS:
        if language == "python":
            subprocess.run([sys.executable, "-c", block], cwd=folder, check=True)
            continue
        for command, expected in commands(block):
            done = subprocess.run(
                command, cwd=folder, env=environment, shell=True, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{command}: {done.stderr}"
            assert masked(done.stdout) == masked(expected), command
            shown += 1
    assert shown >= 6
