"""The examples of services: a unit of systemd and a container file, whose commands, options and files exist."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from command_line import Command
from source_tree import ROOT

EXAMPLES = ROOT / "docs" / "examples"
UNIT = EXAMPLES / "fedpara-edge-device.service"
CONTAINER = EXAMPLES / "Containerfile"
NOBODY = "http://127.0.0.1:9/#join=x"


def unit() -> str:
    return UNIT.read_text().replace("\\\n", " ")


def try_command(words: list[str], folder: Path, run: Command) -> None:
    """The command knows all its options, and goes as far as to the network, where nobody answers."""
    here = [
        re.sub(r"^/(?:var/lib|data|state)\S*", lambda found: str(folder / Path(found[0]).name), each) for each in words
    ]
    ended = run(*here, "--patience", "0.1")
    assert ended.code == 1, ended.err
    assert "expected an answer, found Connection refused" in ended.err


def test_the_command_of_the_unit(tmp_path: Path, run: Command) -> None:
    (start,) = re.findall(r"^ExecStart=(.*)$", unit(), re.MULTILINE)
    program, *words = shlex.split(start)
    assert Path(program).name == "fedpara-edge"
    try_command([NOBODY if each == "${LINK}" else each for each in words], tmp_path, run)


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("the unit: expected systemd-analyze, found none; run: sudo apt install systemd")
    copy = tmp_path / UNIT.name
    copy.write_text(unit().replace("/opt/fedpara/bin/fedpara-edge", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert UNIT.name not in done.stderr, done.stderr


def test_the_exit_code_of_a_stop_is_that_of_an_interruption() -> None:
    assert "SuccessExitStatus=130" in unit()


def test_the_command_and_the_files_of_the_container(tmp_path: Path, run: Command) -> None:
    text = CONTAINER.read_text().replace("\\\n", " ")
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)
    program, *words = json.loads(entry)
    assert program == "fedpara-edge"
    try_command([*words, NOBODY], tmp_path, run)
    (copied,) = re.findall(r"^COPY (\S+) (\S+) ", text, re.MULTILINE)
    assert (ROOT / copied[0]).is_file()
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^VENV := \.venv$", makefile, re.MULTILINE)
    (target,) = re.findall(r"In a checkout: make (\w+), then", text)
    assert re.search(rf"^{target}:.*\n.*\n.*--outdir \$\(VENV\)/wheel ", makefile, re.MULTILINE)
    assert copied[1] == ".venv/wheel/*.whl"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "[device]" in text
    assert "device" in project["optional-dependencies"]
    (version,) = re.findall(r"^FROM docker.io/library/python:(3\.\d+)-", text, re.MULTILINE)
    least = project["requires-python"].removeprefix(">=")
    assert [*map(int, version.split("."))] >= [*map(int, least.split("."))]
    assert "VOLUME /state" in text
