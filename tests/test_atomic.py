"""Writing: all or nothing."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_round

from fedpara_edge.errors import FedparaError, InputError, OutputExistsError
from fedpara_edge.storage import atomic, tensorfile
from fedpara_edge.storage.atomic import (
    check_output,
    remove_leftovers,
    replacing_file,
    replacing_folder,
    sha256_of,
    unsynced,
)


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def break_off(replacing: AbstractContextManager[Path], name: str, error: type[BaseException]) -> None:
    with replacing as temporary:
        (temporary / name).write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_inside_leaves_the_old_file_and_no_other(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    before = listing(tmp_path)
    with pytest.raises(error):
        break_off(replacing_file(path), "", error)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_inside_leaves_the_old_folder_and_no_other(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "a").write_text("old")
    before = listing(tmp_path)
    with pytest.raises(error):
        break_off(replacing_folder(path), "a", error)
    assert listing(tmp_path) == before


def test_a_file_appears_whole_beside_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for text in ("one", "two"):
        with replacing_file(path) as temporary:
            temporary.write_text(text)
            assert temporary.parent.parent == tmp_path
        assert listing(tmp_path) == {"file": text.encode()}
    assert path.stat().st_mode & 0o600 == 0o600


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for name in ("one", "two"):
        with replacing_folder(path) as temporary:
            (temporary / "inner").mkdir()
            (temporary / "inner" / name).write_text(name)
        assert listing(tmp_path) == {"folder": None, "folder/inner": None, f"folder/inner/{name}": name.encode()}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
def test_a_full_or_failing_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    weights = small_round.start_round(tmp_path)
    before = listing(tmp_path)

    def fail(tensors: Any, path: Path, metadata: Any) -> None:  # noqa: ARG001
        path.write_bytes(b"half a file")
        raise OSError(number, "the disk says no")

    monkeypatch.setattr(tensorfile, "save_file", fail)
    with pytest.raises(FedparaError, match="the disk says no; nothing was written: free space") as caught:
        small_round.send(tmp_path, weights, "a")
    assert str(tmp_path / "a.update") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1
    assert listing(tmp_path) == before


def test_safetensors_own_error_is_one_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise tensorfile.SafetensorError("I/O error: no space left on device")

    monkeypatch.setattr(tensorfile, "save_file", fail)
    with pytest.raises(FedparaError, match="no space left on device"):
        tensorfile.write_tensors(tmp_path / "x", {"a": np.zeros(1)}, {"format": "x", "version": 1})
    assert listing(tmp_path) == {}


def test_a_folder_that_does_not_exist_can_not_be_written_to(tmp_path: Path) -> None:
    with pytest.raises(FedparaError, match="nothing was written"), replacing_file(tmp_path / "no" / "file"):
        pass


def test_outputs_are_checked_before_any_work(tmp_path: Path) -> None:
    existing = tmp_path / "existing"
    existing.touch()
    with pytest.raises(
        OutputExistsError, match=r"expected a new output, found an existing one; .* --overwrite"
    ) as caught:
        check_output(existing, overwrite=False)
    assert caught.value.exit_code == 7
    check_output(existing, overwrite=True)
    check_output(tmp_path / "new", overwrite=False)
    with pytest.raises(InputError, match="expected an existing folder"):
        check_output(tmp_path / "no" / "new", overwrite=True)


def test_sha256(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match="expected a readable file"):
            sha256_of(path)


def test_a_folder_is_replaced_in_one_step_or_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    for exchange in (atomic._exchange, lambda *_: False):
        monkeypatch.setattr(atomic, "_exchange", exchange)
        for name in ("one", "two"):
            with replacing_folder(folder) as making:
                (making / name).touch()
            assert listing(tmp_path) == {"folder": None, f"folder/{name}": b""}


def test_interrupted_between_the_renames_of_a_folder_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, renames = tmp_path / "folder", []
    folder.mkdir()
    (folder / "old").touch()
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        renames.append(target)
        if len(renames) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), replacing_folder(folder) as making:
        (making / "new").touch()
    assert len(renames) == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
    assert [entry.name for entry in folder.iterdir()] == ["old"]


KILLED = """
import os, sys
from pathlib import Path
from fedpara_edge.storage import atomic

def kill(*_):
    os.kill(os.getpid(), 9)

what, path = sys.argv[1], Path(sys.argv[2])
if what == "file":
    with atomic.replacing_file(path) as making:
        making.write_bytes(bytes(1000))
        (making.parent / ".tmp123").write_bytes(bytes(1000))  # as safetensors does
        kill()
atomic._exchange = lambda *_: False
rename = Path.rename
with atomic.replacing_folder(path) as making:
    (making / "new").touch()
    Path.rename = lambda self, target: (rename(self, target), kill())
"""


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    killed = subprocess.run([sys.executable, "-c", KILLED, "file", path], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(listing(tmp_path)) == 5
    with replacing_file(path) as busy:
        busy.write_text("busy")
        assert set(listing(tmp_path)) == {
            "file",
            *(str(p.relative_to(tmp_path)) for p in (busy.parent, busy, busy.parent / "fedpara-edge.lock")),
        }
        with replacing_file(path) as second:  # one that is in use is left alone
            second.write_text("second")
        assert busy.exists()
    assert listing(tmp_path) == {"file": b"busy"}


def test_a_folder_that_a_killed_process_had_retired_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").touch()
    killed = subprocess.run([sys.executable, "-c", KILLED, "folder", folder], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not folder.exists()
    remove_leftovers(folder)
    assert listing(tmp_path) == {"folder": None, "folder/old": b""}


def test_a_folder_of_somebody_else_is_no_leftover(tmp_path: Path) -> None:
    (tmp_path / ".file.d").mkdir()
    (tmp_path / ".file.swp").touch()
    with replacing_file(tmp_path / "file") as temporary:
        temporary.write_text("new")
    assert listing(tmp_path) == {"file": b"new", ".file.d": None, ".file.swp": b""}


def test_a_file_with_the_same_content_may_be_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for _ in range(2):
        with replacing_file(path, overwrite=False) as temporary:
            temporary.write_text("same")
    with (
        pytest.raises(OutputExistsError, match="expected a new output, found an existing one"),
        replacing_file(path, overwrite=False) as temporary,
    ):
        temporary.write_text("other")
    assert listing(tmp_path) == {"file": b"same"}


def test_nothing_waits_for_the_disk_while_it_need_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    for expected, context in ((0, unsynced()), (2, nullcontext()), (4, nullcontext())):
        with context, replacing_file(tmp_path / "file") as temporary:
            temporary.write_text(str(expected))
        assert (tmp_path / "file").read_text() == str(expected)
        assert len(synced) == expected
    with pytest.raises(ZeroDivisionError), unsynced(), replacing_file(tmp_path / "file") as temporary:
        temporary.write_text(str(1 / 0))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "4"
