"""Who may import whom: `export -> fedpara_edge <- device_runtime`, and nothing heavy where it does not belong."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from device_runtime.engines.registry import ENGINES

ROOT = Path(__file__).parent.parent
STANDARD = sys.stdlib_module_names
WITH_ONNXRUNTIME = ("ort.py", "ort_training.py", "portable.py")
LIGHT = {"numpy", "safetensors", "click"}
OWN_ROOMS = (["nn"], ["simulation"])


def imports(path: Path, *, nested: bool) -> Iterator[str]:
    """Dotted names that a module imports; those inside functions, and those for types only, if `nested`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {node for part in ast.walk(tree) if is_lazy(part) for node in ast.walk(part)}
    for node in ast.walk(tree):
        if node in inside and not nested:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module


def is_lazy(node: ast.AST) -> bool:
    for_types = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return for_types or isinstance(node, ast.FunctionDef)


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def allowed(path: Path) -> set[str]:
    """Top-level packages, and rooms of our own, that a module may import."""
    room = path.relative_to(ROOT).parts
    if room[0] == "export":
        return {"torch", "onnx", "onnxscript", "onnxruntime", "numpy", "fedpara_edge", "fedpara_edge.nn", "export"}
    if room[0] == "device_runtime":
        engine = {"onnxruntime"} if path.name in ("ort.py", "ort_training.py") else set()
        return {*LIGHT, *engine, "fedpara_edge", "device_runtime"}
    if path.name == "frames.py":
        return {*LIGHT, "zstandard", "fedpara_edge"}
    if room[1] == "report":
        drawing = {"matplotlib"} if path.name == "plots.py" else set()
        return {*LIGHT, *drawing, "fedpara_edge", "fedpara_edge.simulation"}
    if room[1] == "simulation":
        return {*LIGHT, "fedpara_edge", "fedpara_edge.simulation", "device_runtime"}
    if room[1] == "nn":
        return {"torch", *LIGHT, "fedpara_edge", "fedpara_edge.nn"}
    return {*LIGHT, "fedpara_edge"}


def allowed_lazily(path: Path) -> set[str]:
    """What else it may import inside functions."""
    return {"export"} if path == ROOT / "fedpara_edge" / "simulation" / "bundles.py" else set()


def room_of(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "fedpara_edge" and parts[1:2] in OWN_ROOMS else parts[0]


@pytest.mark.parametrize("path", [p for f in ("fedpara_edge", "export", "device_runtime") for p in modules(f)], ids=str)
def test_imports_stay_within_their_rooms(path: Path) -> None:
    found = {room_of(name) for name in imports(path, nested=False)}
    assert found - STANDARD <= allowed(path)
    if not path.is_relative_to(ROOT / "fedpara_edge" / "cli"):  # a command reaches everything, when it is called
        inside = {room_of(name) for name in imports(path, nested=True)}
        assert inside - STANDARD <= allowed(path) | allowed_lazily(path)


@pytest.mark.parametrize("package", ["fedpara_edge", "device_runtime"])
def test_importing_brings_in_nothing_heavy(package: str) -> None:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in modules(package)
        if "nn" not in path.parts and path.name not in ("__main__.py", "plots.py", *WITH_ONNXRUNTIME)
    ]
    heavy = "{'torch', 'onnx', 'onnxruntime', 'onnxscript', 'zstandard', 'matplotlib'}"
    code = f"import {', '.join(names)}, sys\nheavy = {heavy} & sys.modules.keys()\nassert not heavy, heavy"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("engine", ENGINES)
def test_the_engines_bring_in_neither_torch_nor_onnx(engine: str) -> None:
    heavy = "heavy = {'torch', 'onnx'} & sys.modules.keys()"
    module = ENGINES[engine].module
    code = f"import {module}, sys\n{heavy}\nassert not heavy, heavy\nimport onnxruntime.training"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_pickle_is_imported_only_for_the_error_of_a_state_dict() -> None:
    for folder in ("fedpara_edge", "export", "device_runtime"):
        for path in modules(folder):
            names = set(imports(path, nested=True))
            assert path.name == "pretrained.py" or not {"pickle", "dill", "joblib"} & names, path
