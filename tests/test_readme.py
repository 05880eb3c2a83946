"""What the README and the documentation print runs as printed: commands succeed and print the lines shown.

Numbers are not compared: a session says which of its digits vary by machine. A command that is shown without output
only has to succeed, and a block of text is what the Python before it prints. Pages go on from the README's session,
each in a copy of its folder.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import blocks, commands

ROOT = Path(__file__).parent.parent
LINES = 120
ONE_THREAD = {"FEDPARA_EDGE_TRAIN_THREADS": "1", "FEDPARA_EDGE_EVALUATE_THREADS": "1"}
"""Of engines, as tests run side by side; no digit that is compared depends on it."""
PAGES = (
    "quickstart.md",
    "howto/own-model.md",
    "howto/data.md",
    "howto/transfer.md",
    "howto/mobilenet.md",
    "howto/python.md",
    "howto/fewer-bytes.md",
    "howto/personalization.md",
    "howto/algorithms.md",
    "howto/tree.md",
    "howto/trust.md",
    "howto/command-line.md",
)


def masked(text: str) -> list[str]:
    """Lines with every hash and number replaced and the white space of tables folded."""
    without_hashes = re.sub(r"\b[0-9a-f]{64}\b", "#", text.strip())
    return [re.sub(r"[-+]?[\d.,]+(e-?\d+)?%?", "#", re.sub(r" +", " ", line)) for line in without_hashes.splitlines()]


def run_page(path: Path, folder: Path) -> list[str]:
    """Run all blocks of a page in a folder; the commands that it showed."""
    path_of_commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path_of_commands, **ONE_THREAD}
    shown: list[str] = []
    printed = ""
    for language, text, name in blocks(path):
        if name is not None:
            (folder / name).write_text(text, encoding="utf-8")
        if language == "python":
            done = subprocess.run([sys.executable, "-c", text], cwd=folder, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{text}\n{done.stderr}"
            printed = done.stdout
        if language == "text":
            assert masked(printed) == masked(text)
        if language == "console":
            for command, expected in commands(text):
                done = subprocess.run(
                    command, cwd=folder, env=environment, shell=True, capture_output=True, text=True, check=False
                )
                assert done.returncode == 0, f"{command}: {done.stderr}"
                assert not expected or masked(done.stdout) == masked(expected), command
                shown.append(command)
    return shown


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of the README's session, in which the checkout's examples are visible, and its commands."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder, run_page(ROOT / "README.md", folder)


@pytest.mark.slow
def test_the_session_of_the_readme_runs_as_printed(session: tuple[Path, list[str]]) -> None:
    _, shown = session
    assert [command.split()[1] for command in shown[:3]] == ["demo", "split", "export"]
    assert len(shown) >= 6


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_as_printed(page: str, session: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, _ = session
    shutil.copytree(folder, tmp_path / "page", symlinks=True)
    found = {language for language, *_ in blocks(ROOT / "docs" / page)}
    assert found & {"console", "python"}
    run_page(ROOT / "docs" / page, tmp_path / "page")


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= LINES


def test_every_link_of_the_readme_leads_to_a_file() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).is_file()] == []
