"""Node.js and the packages of the phone's page, for tests of it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import ROOT

WEB, PHONE = ROOT / "device_runtime" / "web", ROOT / "tests" / "phone"
BESIDE = Path(sys.executable).parent


def node() -> str:
    """Path of Node.js, after the page's packages were installed; without one the test is skipped, by name."""
    if (BESIDE / "node").exists() or shutil.which("node"):
        run_program("sh", PHONE / "install.sh", sys.executable)
        return shutil.which("node", path=str(BESIDE)) or str(shutil.which("node"))
    pytest.skip("the phone's page: expected Node.js, found none; run: make web")


def run_node(*arguments: object) -> str:
    """Run Node.js to its end; return what it prints."""
    return run_program(node(), *arguments)


def run_program(*command: object) -> str:
    """Run a program to its end; return what it prints."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
