"""What only the engine `ort-training` has; the rest is in `test_training_engines`."""

import shutil
from pathlib import Path

import pytest
from small_net import SmallBundle

from device_runtime.engines.ort_training import open_engine
from fedpara_edge.errors import WrongBundleError
from fedpara_edge.formats.bundle import Bundle, open_bundle


@pytest.fixture
def bundle(small_bundle: SmallBundle, tmp_path: Path) -> Bundle:
    """A copy to spoil."""
    shutil.copytree(small_bundle().path, tmp_path / "bundle")
    return open_bundle(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("training_model.onnx", "expected a self-contained graph, found a field of type 6"),
        ("eval_model.onnx", "expected a self-contained graph, found a field of type 6"),
        ("checkpoint", "expected artifacts that onnxruntime-training loads, found "),
    ],
)
def test_damaged_artifacts_are_refused(name: str, words: str, bundle: Bundle) -> None:
    bundle.file(name).write_bytes(b"not onnx")
    with pytest.raises(WrongBundleError, match=words):
        open_engine(bundle)


def test_the_runtimes_own_optimizer_is_not_needed(bundle: Bundle) -> None:
    bundle.file("optimizer_model.onnx").unlink()
    open_engine(bundle)
