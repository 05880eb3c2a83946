"""Engines that can't train a model: refused where they are named, with one that can; else left out with the reason."""

import os
import signal
from pathlib import Path

import onnx
import pytest
import torch
from step_models import VECTOR, Formula

from export import export_bundle
from export.gradients import NoGradientError
from fedpara_edge.errors import FedparaError, InputError
from fedpara_edge.formats.bundle import ENGINES, ONNXRUNTIME_FILES, ORT_TRAINING_FILES
from fedpara_edge.formats.recipe import ExportConfig


def options(**more: object) -> ExportConfig:
    return ExportConfig(**{"name": "test", "input_shape": VECTOR, "input_dtype": "float32", **more})


@pytest.fixture
def without_tanh(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine ort-training refuses a Tanh."""

    def refuse(model: onnx.ModelProto, *_: object) -> None:
        raise NoGradientError(next(node for node in model.graph.node if node.op_type == "Tanh"), "Tanh")

    monkeypatch.setattr("export.artifacts.StandIns", refuse)


@pytest.mark.usefixtures("without_tanh")
def test_an_engine_that_was_not_named_is_left_out(tmp_path: Path) -> None:
    left_out: dict[str, str] = {}
    bundle, verification = export_bundle(
        Formula(torch.tanh), tmp_path / "bundle", options(), on_left_out=left_out.__setitem__
    )
    assert bundle.manifest.engines == ("onnxruntime",) == tuple(verification)
    assert left_out.keys() == {"ort-training"}
    assert "found Tanh, which has none" in left_out["ort-training"]
    assert "nothing was written" not in left_out["ort-training"]
    assert "\n" not in left_out["ort-training"]
    assert set(ONNXRUNTIME_FILES) <= bundle.manifest.files.keys()
    assert not set(ORT_TRAINING_FILES) & bundle.manifest.files.keys()
    assert not set(ORT_TRAINING_FILES) & {file.name for file in bundle.path.iterdir()}


def test_nothing_is_left_out_of_what_both_can(tmp_path: Path) -> None:
    left_out: dict[str, str] = {}
    bundle, _ = export_bundle(Formula(torch.tanh), tmp_path / "bundle", options(), on_left_out=left_out.__setitem__)
    assert bundle.manifest.engines == ENGINES
    assert not left_out


@pytest.mark.usefixtures("without_tanh")
def test_a_named_engine_is_refused_with_one_that_can(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"found Tanh.*; onnxruntime can train it: --engines onnxruntime$"):
        export_bundle(Formula(torch.tanh), tmp_path / "bundle", options(engines=("ort-training",)))
    with pytest.raises(InputError, match=r"found Tanh") as both:
        export_bundle(Formula(torch.tanh), tmp_path / "bundle", options(engines=ENGINES))
    assert "can train it" not in str(both.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("engines", [None, ("onnxruntime",), ("ort-training",), ENGINES])
def test_no_engine_is_recommended_where_none_can(engines: tuple[str, ...] | None, tmp_path: Path) -> None:
    model = Formula(lambda x: x.scatter_reduce(1, x.argsort(1)[:, :3], x[:, :3], "amax"))
    with pytest.raises(InputError, match=r"found .*Scatter") as refused:
        export_bundle(model, tmp_path / "bundle", options(engines=engines))
    assert "--engine" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def crash(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


class Crashing:
    """A trial whose files crash when they run."""

    def __init__(self, *_: object) -> None:
        pass

    run = step = crash


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "crashing"), [("export.artifacts._generate", crash), ("export.exporter.OrtTrainingTrial", Crashing)]
)
def test_a_crash_of_a_runtime_leaves_its_engine_out(
    place: str, crashing: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, crashing)
    left_out: dict[str, str] = {}
    bundle, _ = export_bundle(Formula(torch.tanh), tmp_path / "one", options(), on_left_out=left_out.__setitem__)
    assert bundle.manifest.engines == ("onnxruntime",)
    assert "found that it ends the process with SIGSEGV" in left_out["ort-training"]
    with pytest.raises(FedparaError, match=r"found that it ends the process with SIGSEGV .*; onnxruntime can train it"):
        export_bundle(Formula(torch.tanh), tmp_path / "two", options(engines=("ort-training",)))
