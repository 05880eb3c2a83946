"""The state folder: what is put in comes out, belongs to one bundle and to one process at a time."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from kept import commit

from device_runtime.state import open_state
from device_runtime.statefiles import Committed, Progress
from fedpara_edge.errors import BusyError, FedparaError, InputError, WrongBundleError

FINGERPRINT = "5f" * 32
CALL = {"round": 3, "base": "ab", "learning_rate": 0.1, "schedule": {"shape": "cosine"}, "codec": "float32"}
GROUPS = {
    "personal": {"a/b": np.arange(6, dtype=np.float32).reshape(2, 3), "scalar": np.float64(1.5)},
    "residual": {"a/b": np.array([], np.int64), "bytes": np.frombuffer(b"opaque", np.uint8)},
}
COMMITTED = Committed(call=CALL, before=GROUPS, after={"personal": {"w": np.ones(2, np.float32)}})
PROGRESS = Progress(call=CALL, output="/tmp/out", step=7, seconds=1.25, loss_sums=(1 / 3, 0.1), groups=GROUPS)


def assert_same_groups(found, expected):
    assert {name: set(group) for name, group in found.items()} == {name: set(group) for name, group in expected.items()}
    for name, group in expected.items():
        for tensor in group:
            np.testing.assert_array_equal(found[name][tensor], group[tensor], strict=True)


def test_a_new_folder_is_empty(tmp_path):
    with open_state(tmp_path / "state", FINGERPRINT) as state:
        assert state.committed() is None
        assert state.progress() is None
        state.remove_progress()


def test_saved_then_read_is_the_identity(tmp_path):
    with open_state(tmp_path, FINGERPRINT) as state:
        commit(state, COMMITTED)
        state.save_progress(PROGRESS)
    with open_state(tmp_path, FINGERPRINT) as state:
        committed, progress = state.committed(), state.progress()
        state.remove_progress()
        assert state.progress() is None
    assert committed.call == CALL
    assert_same_groups(committed.before, COMMITTED.before)
    assert_same_groups(committed.after, COMMITTED.after)
    assert replace(progress, groups=GROUPS) == PROGRESS
    assert_same_groups(progress.groups, GROUPS)


def test_nothing_to_keep_is_kept_too(tmp_path):
    with open_state(tmp_path, FINGERPRINT) as state:
        commit(state, Committed(call=CALL, before={"personal": {}}, after={"personal": {}}))
        assert state.committed().call == CALL


def test_a_repeated_call_begins_where_the_first_one_did():
    assert COMMITTED.start_of(dict(CALL)) is COMMITTED.before
    assert COMMITTED.start_of({**CALL, "round": 4}) is COMMITTED.after


def test_of_what_is_kept_only_personal_tensors_go_on_in_an_earlier_round(tmp_path, capsys):
    with open_state(tmp_path, FINGERPRINT) as state:
        commit(state, Committed(call=CALL, before={}, after=GROUPS))
        groups = state.groups_for({**CALL, "round": 0})
    assert_same_groups(groups, {"personal": GROUPS["personal"]})
    assert "dropped residual of round 3, as round 0 begins without them" in capsys.readouterr().err


def test_the_client_keeps_its_name(tmp_path):
    with open_state(tmp_path / "a", FINGERPRINT) as state:
        name = state.client()
        assert state.client() == name
    with open_state(tmp_path / "a", FINGERPRINT) as state:
        assert state.client() == name
    with open_state(tmp_path / "b", FINGERPRINT) as state:
        assert state.client() != name
    (tmp_path / "a" / "client").write_bytes(b"\xff\xfe")
    with open_state(tmp_path / "a", FINGERPRINT) as state, pytest.raises(InputError, match="device's name"):
        state.client()


def test_one_process_at_a_time(tmp_path):
    script = (
        "import sys; from pathlib import Path; from device_runtime.state import open_state\n"
        "with open_state(Path(sys.argv[1]), ''): print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "open\n"
        with (
            pytest.raises(BusyError, match=r"no other process uses, found it in use; wait .*"),
            open_state(tmp_path, ""),
        ):
            pass
        other.kill()
        other.wait()
        with open_state(tmp_path, ""), pytest.raises(BusyError, match="in use"), open_state(tmp_path, ""):
            pass
    with open_state(tmp_path, ""):
        pass


def test_another_bundle_is_refused(tmp_path):
    for save in (lambda state: commit(state, COMMITTED), lambda state: state.save_progress(PROGRESS)):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with open_state(folder, FINGERPRINT) as state:
            save(state)
        with (
            open_state(folder, "0a" * 32) as state,
            pytest.raises(WrongBundleError, match="found that of 5f5f5f5f5f5f…"),
        ):
            (state.committed(), state.progress())


@pytest.mark.parametrize(("name", "method"), [("lasting", "committed"), ("progress", "progress")])
def test_a_damaged_file_is_named_with_its_remedy(tmp_path, name, method):
    with open_state(tmp_path, FINGERPRINT) as state:
        commit(state, COMMITTED)
        state.save_progress(PROGRESS)
        file = tmp_path / f"{name}.safetensors"
        content = file.read_bytes()
        for length in (0, 7, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:length])
            with pytest.raises(InputError, match=rf"{name}.safetensors: expected .*; delete it to begin"):
                getattr(state, method)()


def test_leftovers_of_a_power_cut_are_removed_and_nothing_else(tmp_path):
    for name in (".progress.safetensors.x1y2", ".lasting.safetensors.abcd", ".client.0", ".mine", "mine.txt"):
        (tmp_path / name).write_text("")
    with open_state(tmp_path, FINGERPRINT):
        assert {file.name for file in tmp_path.iterdir()} == {".mine", "mine.txt", "lock"}


def test_a_place_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("file", "none/state"):
        with pytest.raises(InputError, match="expected a state folder to write in"), open_state(tmp_path / place, ""):
            pass


def test_a_full_disk_leaves_the_old_state(tmp_path, monkeypatch):
    with open_state(tmp_path, FINGERPRINT) as state:
        commit(state, COMMITTED)

        def refuse(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("fedpara_edge.storage.tensorfile.save_file", refuse)
        with pytest.raises(FedparaError, match="No space left on device"):
            commit(state, replace(COMMITTED, call={}))
        assert state.committed().call == CALL
        assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]
