"""`doctor` says yes to what can be imported, not to what is merely installed."""

import re
import signal
import sys
from pathlib import Path

import pytest
from command_line import Command

from fedpara_edge import installation
from fedpara_edge.cli import trial
from fedpara_edge.cli.trial import why_not_imported
from fedpara_edge.installation import known_fault


@pytest.fixture(autouse=True)
def _afresh():
    why_not_imported.cache_clear()
    yield
    why_not_imported.cache_clear()


def shadow(folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, source: str) -> None:
    """Have `import module` run a source."""
    (folder / f"{module}.py").write_text(source)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])


def test_a_crash_is_told_from_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not_imported("numpy") == ""
    shadow(tmp_path, monkeypatch, "torch", f"import os\nos.kill(os.getpid(), {int(signal.SIGILL)})")
    assert why_not_imported("torch") == "it ends Python with SIGILL"
    shadow(tmp_path, monkeypatch, "onnx", "raise ImportError('libgomp.so.1: cannot open shared object file')")
    assert why_not_imported("onnx") == "ImportError: libgomp.so.1: cannot open shared object file"
    shadow(tmp_path, monkeypatch, "onnxscript", "import time\ntime.sleep(30)")
    assert why_not_imported("onnxscript", limit_seconds=0.2) == "not done after 0.2 s"


@pytest.mark.slow
def test_doctor_says_no_where_onnxruntime_crashes(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shadow(tmp_path, monkeypatch, "onnxruntime", "import os, signal\nos.kill(os.getpid(), signal.SIGILL)")
    text = run("doctor").out
    assert re.search(
        r"^no   device: .*onnxruntime\S* [\d.]+ can't be imported: it ends Python with SIGILL; inst", text, re.M
    )
    assert re.search(r"^yes  server: ", text, re.M)
    assert "engines here: none" in text
    found = run("doctor", "--json").json
    assert not found["capabilities"]["device"]["available"]
    assert found["engines"] == []


def test_the_wheel_that_crashes_on_a_raspberry_pi_is_named_there_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(installation.platform, "machine", lambda: "aarch64")
    assert "pip install 'onnxruntime!=1.21.0'" in known_fault("onnxruntime", "1.21.0")
    assert known_fault("onnxruntime", "1.22.0") == ""
    monkeypatch.setattr(installation.platform, "machine", lambda: "x86_64")
    assert known_fault("onnxruntime", "1.21.0") == ""


def test_torch_is_not_imported_along_with_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shadow(tmp_path, monkeypatch, "torch", "import pathlib\npathlib.Path(__file__).with_name('ran').touch()")
    assert trial.faults(["onnxruntime", "onnxruntime-training-cpu"]) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["torch.py"]
