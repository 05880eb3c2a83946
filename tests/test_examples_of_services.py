"""The examples of services: a unit of systemd and a container file, whose commands, options and files exist."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from command_line import Command
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from source_tree import ROOT

from fedpara_edge.trust.keys import new_key

EXAMPLES = ROOT / "docs" / "examples"
UNIT = EXAMPLES / "fedpara-edge-device.service"
CONTAINER = EXAMPLES / "Containerfile"
NOBODY = "http://127.0.0.1:9/#join=x"


START_WITH_ONLY = """
import sys
from importlib.machinery import PathFinder

others = set(sys.argv.pop(1).split(","))


class Only:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in others else PathFinder.find_spec(name, path, target)


sys.meta_path[:] = [Only if finder is PathFinder else finder for finder in sys.meta_path]
from fedpara_edge.cli import main

main()
"""
"""The command line, which finds no module of the packages in the first argument."""


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


def extras_of_the_container() -> set[str]:
    (extras,) = re.findall(r"\.whl\)\[([\w,]+)\]", CONTAINER.read_text())
    return set(extras.split(","))


def distributions_with(extras: set[str]) -> set[str]:
    """Names of the distributions that an installation with some extras brings here."""
    found: set[str] = set()
    waiting = [("fedpara-edge", frozenset(extras))]
    while waiting:
        name, wanted = waiting.pop()
        found.add(canonicalize_name(name))
        for requirement in map(Requirement, metadata.requires(name) or ()):
            marker, chosen = requirement.marker, (requirement.name, frozenset(requirement.extras))
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *wanted)):
                waiting += [chosen] if chosen[1] or canonicalize_name(chosen[0]) not in found else []
    return found


def test_the_container_has_the_packages_that_the_options_of_an_agent_need(tmp_path: Path) -> None:
    """An agent that signs goes as far as to the network, and all extras that errors of a device name are there."""
    brought = distributions_with(extras_of_the_container())
    distributions = metadata.packages_distributions()
    others = [name for name, of in distributions.items() if not brought & {canonicalize_name(each) for each in of}]
    assert "torch" in others
    new_key(tmp_path / "key")
    words = ["device", NOBODY, "--data", "x.npz", "--state", f"{tmp_path}/state", "--key", f"{tmp_path}/key"]
    start = [sys.executable, "-c", START_WITH_ONLY, ",".join(others), *words, "--patience", "0.1"]
    done = subprocess.run(
        start, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert "expected an answer, found Connection refused" in done.stderr, done.stderr
    sources = "".join(path.read_text() for path in (ROOT / "device_runtime").rglob("*.py"))
    assert set(re.findall(r"install_line\('(\w+)'\)", sources)) <= extras_of_the_container()


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
    assert extras_of_the_container() <= project["optional-dependencies"].keys()
    (version,) = re.findall(r"^FROM docker.io/library/python:(3\.\d+)-", text, re.MULTILINE)
    least = project["requires-python"].removeprefix(">=")
    assert [*map(int, version.split("."))] >= [*map(int, least.split("."))]
    assert "VOLUME /state" in text
