"""What is in the place of a file that is read whole; `fuzz.py` puts the same in the place of every file."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Command

from device_runtime.sources import tables
from fedpara_edge.errors import InputError
from fedpara_edge.storage.wholefile import MAX_BYTES, read_text, real_path

STAND_INS: dict[str, Callable[[Path], object]] = {
    "a folder, pipe or device": os.mkfifo,
    "a folder": Path.mkdir,
    "pipe or device": lambda path: path.symlink_to("/dev/zero"),
    "symbolic links": lambda path: path.symlink_to(path),
    f"more than {MAX_BYTES} bytes": lambda path: (path.touch(), os.truncate(path, MAX_BYTES + 1)),
}


@pytest.mark.parametrize("words", STAND_INS)
def test_what_is_no_file_or_too_large_is_not_opened(words: str, tmp_path: Path) -> None:
    STAND_INS[words](tmp_path / "file")
    with pytest.raises(OSError, match=words):
        read_text(tmp_path / "file")


@pytest.mark.parametrize("arguments", [("keys", "show", "p"), ("keys", "sign", "p"), ("--config", "p", "doctor"),
                                       ("inspect", "p"), ("predict", "p", "--data", "p", "-o", "q")])  # fmt: skip
def test_a_pipe_is_refused_and_not_waited_for(
    arguments: tuple[str, ...], run: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("p")
    ended = run(*arguments, *(("--key", "p") if "sign" in arguments else ()))
    assert ended.code == 2
    assert "a folder, pipe or device" in ended.err


def test_links_in_a_circle_lead_to_themselves(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert real_path(tmp_path / "a").parent == tmp_path


def test_a_table_in_one_endless_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_LINE", 1000)
    (tmp_path / "t.csv").write_text("a,b\n" + "1" * 999 + ",2\n")
    with pytest.raises(InputError, match="lines of less than 1000 characters"):
        tables.read_table(tmp_path / "t.csv")
