"""The public API: its names, that they are imported when they are used, and only from this installation."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

import fedpara_edge

HEAVY = ("torch", "onnx", "onnxruntime", "matplotlib", "zstandard", "device_runtime", "export")
SERVER = ("run_round", "aggregate", "read_weights", "publish_change", "AggregateConfig", "open_bundle")
DEVICE = ("train", "evaluate", "predict", "open_data", "open_engine", "TrainConfig")
ERRORS = [name for name in fedpara_edge.__all__ if name.endswith("Error")]


def python(code: str, folder: Path | None = None) -> str:
    """Run Python in a folder, with the folder first on its path as `python -c` has it; what it prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_public_names_are_these() -> None:
    assert sorted(fedpara_edge.__all__) == fedpara_edge.__all__
    assert " ".join(fedpara_edge.__all__) == (
        "AggregateConfig BudgetError BusyError DivergedError ExportConfig Factorization FedparaError InputError "
        "InvalidUpdateError OutputExistsError TooFewUpdatesError TrainConfig TrustError WrongBundleError aggregate "
        "apply_change convert evaluate export find_encoder fold make_partial open_bundle open_data open_engine predict "
        "publish_change read_metrics read_weights run_round simulate train write_report write_weights"
    )
    assert set(fedpara_edge.__all__) == set(fedpara_edge._PLACES)


def test_nothing_else_is_public_by_accident() -> None:
    code = "import fedpara_edge; print(*(name for name in vars(fedpara_edge) if not name.startswith('_')))"
    assert set(python(code).split()) <= {"annotations", "importlib", "TYPE_CHECKING", "Any"}
    assert set(dir(fedpara_edge)) >= set(fedpara_edge.__all__)


@pytest.mark.parametrize("name", fedpara_edge.__all__)
def test_every_name_is_there_documented_and_typed(name: str) -> None:
    value = getattr(fedpara_edge, name)
    assert value is getattr(fedpara_edge, name)
    assert inspect.getdoc(value)
    if inspect.isfunction(value):
        assert get_type_hints(value).keys() == {*inspect.signature(value).parameters, "return"}
        paths = [hint for hint in inspect.get_annotations(value).values() if "Path" in hint]
        assert all("str" in hint for hint in paths), f"a path that is no text: {paths}"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'fedpara_edge' has no attribute 'aggregat'"):
        _ = fedpara_edge.aggregat  # type: ignore[attr-defined]
    assert not hasattr(fedpara_edge, "_private")


def test_all_errors_have_one_base() -> None:
    assert ERRORS
    for name in ERRORS:
        assert issubclass(getattr(fedpara_edge, name), fedpara_edge.FedparaError)


def test_importing_brings_in_nothing_of_weight() -> None:
    code = f"import sys, fedpara_edge; print(*({set(HEAVY)!r} & sys.modules.keys()))"
    assert python(code).split() == []


def test_a_server_needs_no_runtime_and_a_device_no_torch() -> None:
    code = "import sys, fedpara_edge as fe\nfor n in {}: getattr(fe, n); print(n, *({} & sys.modules.keys()))"
    for names, heavy in (
        (SERVER, {"torch", "onnx", "onnxruntime", "device_runtime", "export"}),
        (DEVICE, {"torch", "onnx", "export"}),
    ):
        assert python(code.format(names, heavy)).splitlines() == list(names)


@pytest.mark.parametrize(("package", "name"), [("export", "export"), ("device_runtime", "train")])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_module_that_shadows_ours_is_named_and_not_run(package: str, name: str, kind: str, tmp_path: Path) -> None:
    place = tmp_path / f"{package}.py"
    if kind == "folder":
        (tmp_path / package).mkdir()
        place = tmp_path / package / "__init__.py"
    place.write_text("raise SystemExit('this was run')\n")
    attempt = f"try:\n    fedpara_edge.{name}\nexcept fedpara_edge.InputError as error:\n    print(error)"
    code = f"import fedpara_edge\n{attempt}"
    said = python(code, tmp_path)
    shadow = place if kind == "file" else place.parent
    assert f"{shadow.resolve()}: expected no module with the name of" in said
    assert "rename it" in said


@pytest.mark.parametrize("package", ["fedpara_edge", "export", "device_runtime"])
def test_the_packages_are_typed(package: str) -> None:
    assert (Path(fedpara_edge.__file__).parents[1] / package / "py.typed").is_file()
