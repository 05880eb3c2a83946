"""Who may import whom: `export -> fedpara_edge <- device_runtime`, floor by floor, and nothing heavy out of place.

A *room* is a folder, or a module beside folders. On each list of floors the lowest comes first; a room may import its
own modules and rooms of lower floors, neither a neighbour on its own floor nor what is above it.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from source_tree import PACKAGES, ROOT, modules, name_of

from device_runtime.engines.registry import ENGINES

FACE = ROOT / "fedpara_edge" / "__init__.py"
"""The public API, whose names are loaded when they are used."""
STANDARD = sys.stdlib_module_names
WITH_TORCH = ("device.py", "engine.py", "optimizers.py", "vector.py")
WITH_ONNXRUNTIME = ("ort.py", "ort_training.py", "portable.py")
WITH_FLOWER = ("client.py", "exchange.py", "messages.py", "server.py", "simulated.py")
"""What Flower runs, or speaks its messages; the rest of the room `fleet` imports it where it runs a fleet."""
WITH_FLEET = (*WITH_FLOWER, "gathering.py", "keys.py", "programs.py", "rounds.py")
DRAWING = ("bars.py", "codecplots.py", "drawing.py", "labels.py", "lines.py", "savings.py", "style.py")
READERS = {"images.py": {"PIL"}, "sounds.py": {"soundfile"}, "tables.py": {"pyarrow"}}
"""What reads the sources that numpy and the standard library can't read."""
LIGHT = {"numpy", "safetensors", "click"}
WEB = {
    "access.py": {"starlette"},
    "answers.py": {"starlette"},
    "application.py": {"starlette", "anyio"},
    "operator.py": {"starlette", "anyio"},
    "requests.py": {"starlette"},
    "certificates.py": {"cryptography"},
    "invitation.py": {"segno"},
    "running.py": {"uvicorn"},
    "connections.py": {"uvicorn"},
}
"""What talks HTTP in the room `serving`."""
SIGNING = {"tuf", "securesystemslib", "cryptography", "urllib3"}
"""What signs and verifies, for the room `trust` alone; certificates and Flower's keys are made with the last of it."""

LIBRARY: tuple[set[str], ...] = (
    {"fedpara_edge.errors", "fedpara_edge.registry", "fedpara_edge._version"},
    {"fedpara_edge.options", "fedpara_edge.installation", "fedpara_edge.metrics"},
    {"fedpara_edge.factors", "fedpara_edge.storage", "fedpara_edge.algorithms", "fedpara_edge.losses"},
    {"fedpara_edge.codecs", "fedpara_edge.privacy"},
    {"fedpara_edge.formats"},
    {"fedpara_edge.aggregation", "fedpara_edge.nn"},
)
APPLICATIONS: tuple[set[str], ...] = (
    {"fedpara_edge.simulation", "fedpara_edge.trust", "fedpara_edge.hub"},
    {"fedpara_edge.serving"},
    {"fedpara_edge.demo", "fedpara_edge.report", "fedpara_edge.fleet"},
    {"fedpara_edge.advising"},
    {"fedpara_edge.cli"},
    {"fedpara_edge.__main__"},
)
SIMULATION: tuple[set[str], ...] = (
    {"fedpara_edge.simulation.data", "fedpara_edge.simulation.sampling", "fedpara_edge.simulation.traffic"},
    {"fedpara_edge.simulation.plan"},
    {"fedpara_edge.simulation.about", "fedpara_edge.simulation.metrics"},
    {"fedpara_edge.simulation.growth"},
    {"fedpara_edge.simulation.folder"},
    {"fedpara_edge.simulation.torchengine"},
    {"fedpara_edge.simulation.processes", "fedpara_edge.simulation.tasks"},
    {"fedpara_edge.simulation.bundles"},
    {"fedpara_edge.simulation.job"},
    {"fedpara_edge.simulation.evaluating"},
    {"fedpara_edge.simulation.rounds"},
    {"fedpara_edge.simulation.runner"},
)
EXPORT: tuple[set[str], ...] = (
    {"export.apart", "export.complaints", "export.curvature", "export.doubling"},
    {"export.forward"},
    {"export.gradients", "export.folding"},
    {"export.step", "export.native"},
    {"export.standins"},
    {"export.artifacts", "export.batches"},
    {"export.trials", "export.fidelity"},
    {"export.reference", "export.attempts"},
    {"export.comparison", "export.stability"},
    {"export.verify"},
    {"export.engines"},
    {"export.exporter", "export.example"},
    {"export.lazy"},
    {"export.build"},
    {"export.torchmodel"},
)
DEVICE: tuple[set[str], ...] = (
    {
        "device_runtime.engines",
        "device_runtime.interrupts",
        "device_runtime.labels",
        "device_runtime.progress",
        "device_runtime.remedies",
        "device_runtime.result",
        "device_runtime.schedule",
        "device_runtime.sources",
        "device_runtime.statefiles",
    },
    {"device_runtime.data", "device_runtime.state", "device_runtime.config"},
    {
        "device_runtime.batches",
        "device_runtime.loading",
        "device_runtime.noising",
        "device_runtime.nonfinite",
        "device_runtime.prediction",
    },
    {"device_runtime.epochs", "device_runtime.evaluation"},
    {"device_runtime.call", "device_runtime.tuning"},
    {"device_runtime.clients", "device_runtime.training"},
    {"device_runtime.agent"},
)
HOUSES = (LIBRARY + APPLICATIONS, SIMULATION, EXPORT, DEVICE)
"""Lists of floors, each complete for the rooms of the package that it begins with."""


@cache
def imports(source: str, *, nested: bool) -> tuple[str, ...]:
    """Dotted names of what a module imports, `package.module` for `from package import module` too.

    Those inside functions, and those for types only, if `nested`.
    """
    return tuple(name for node in import_statements(ast.parse(source), nested=nested) for name in names_in(node))


def import_statements(tree: ast.AST, *, nested: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.stmt | ast.ExceptHandler | ast.match_case) and (nested or not is_lazy(node)):
            yield from import_statements(node, nested=nested)


def names_in(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    assert node.level == 0, "relative import"
    assert node.module is not None
    named = [f"{node.module}.{alias.name}" for alias in node.names]
    parts = [name for name in named if is_module(name)]
    yield from parts
    if len(parts) < len(named):
        yield node.module


@cache
def is_module(name: str) -> bool:
    path = ROOT / Path(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def is_lazy(node: ast.AST) -> bool:
    for_types = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return for_types or isinstance(node, ast.FunctionDef)


EVERY = modules(*PACKAGES)


def floor_of(house: tuple[set[str], ...], name: str) -> tuple[int, str] | None:
    """The floor and the room in which a module lies; None if it is not of the house."""
    for number, floor in enumerate(house):
        for room in floor:
            if name == room or name.startswith(f"{room}."):
                return number, room
    return None


def upward(name: str, source: str) -> list[str]:
    """Imports of a module that lead to its own floor or higher, as `from -> to`."""
    wrong = []
    for house in HOUSES:
        here = floor_of(house, name)
        for imported in imports(source, nested=True):
            there = floor_of(house, imported)
            if here and there and here[1] != there[1] and there[0] >= here[0]:
                wrong.append(f"{here[1]} -> {there[1]}")
    return wrong


def allowed(path: Path) -> set[str]:
    """Top-level packages that a module may import."""
    package, *rooms = path.relative_to(ROOT).parts
    room = rooms[0]
    if package == "export":
        return {"torch", "onnx", "onnxscript", "onnxruntime", "numpy", "fedpara_edge", "export"}
    if package == "device_runtime":
        engine = {"onnxruntime"} if path.name in ("ort.py", "ort_training.py") else set()
        return {*LIGHT, *engine, "fedpara_edge", "device_runtime"}
    if path.name == "frames.py":
        return {*LIGHT, "zstandard", "fedpara_edge"}
    if room == "report":
        return {*LIGHT, *({"matplotlib"} if path.name in DRAWING else set()), "fedpara_edge"}
    if path.name == "accounting.py":
        return {"dp_accounting"}
    if room == "trust":
        return {*LIGHT, *SIGNING, "fedpara_edge"}
    if room == "fleet":
        own = {"cryptography"} if path.name == "keys.py" else {"flwr"} if path.name in WITH_FLOWER else set()
        return {*LIGHT, *own, "fedpara_edge", "device_runtime"}
    if path.parent.name == "torchengine" and path.name in WITH_TORCH:
        return {"torch", *LIGHT, "fedpara_edge", "device_runtime", "export"}
    if room == "serving":
        return {*LIGHT, *WEB.get(path.name, set()), "fedpara_edge", "device_runtime"}
    if room in ("simulation", "cli"):
        return {*LIGHT, "fedpara_edge", "device_runtime"}
    if room == "nn":
        return {"torch", *LIGHT, "fedpara_edge"}
    return {*LIGHT, "fedpara_edge"}


def allowed_lazily(path: Path) -> set[str]:
    """What else it may import inside functions."""
    if path.is_relative_to(ROOT / "fedpara_edge" / "cli") or path == FACE:
        return {"device_runtime", "export"}
    if path == ROOT / "fedpara_edge" / "report" / "tracking.py":
        return {"tensorboardX", "sqlalchemy", "mlflow", "wandb"}
    if path.parent == ROOT / "fedpara_edge" / "hub":
        return {"huggingface_hub"}
    if path.parent == ROOT / "fedpara_edge" / "fleet":
        return {"flwr"}
    if path.parent == ROOT / "device_runtime" / "sources":
        return READERS.get(path.name, set())
    return {"export"} if path == ROOT / "fedpara_edge" / "simulation" / "bundles.py" else set()


@pytest.mark.parametrize("path", EVERY, ids=name_of)
def test_imports_lead_down(path: Path) -> None:
    assert not upward(name_of(path), path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("house", HOUSES, ids=lambda house: min(house[0]).rpartition(".")[0])
def test_every_room_has_its_floor(house: tuple[set[str], ...]) -> None:
    rooms = [room for floor in house for room in floor]
    assert len(rooms) == len(set(rooms))
    package = ROOT / Path(*rooms[0].split(".")[:-1])
    found = {name_of(path) for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found - {name_of(package)} == set(rooms)


@pytest.mark.parametrize(
    ("name", "source", "wrong"),
    [
        (
            "fedpara_edge.codecs.codec",
            "from fedpara_edge.formats.update import Update",
            "codecs -> fedpara_edge.formats",
        ),
        (
            "fedpara_edge.codecs.codec",
            "def f():\n    from fedpara_edge import formats",
            "codecs -> fedpara_edge.formats",
        ),
        ("fedpara_edge.nn.layers", "import fedpara_edge.aggregation.stream", "nn -> fedpara_edge.aggregation"),
        ("fedpara_edge.simulation.job", "from fedpara_edge.report import page", "simulation -> fedpara_edge.report"),
        ("device_runtime.engines.ort", "from device_runtime.data import Dataset", "engines -> device_runtime.data"),
    ],
)
def test_an_import_that_leads_up_is_seen(name: str, source: str, wrong: str) -> None:
    assert [found for found in upward(name, source) if found.endswith(wrong)]


@pytest.mark.parametrize("path", EVERY, ids=name_of)
def test_imports_stay_within_their_packages(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    found = {name.partition(".")[0] for name in imports(source, nested=False)}
    assert found - STANDARD <= allowed(path)
    inside = {name.partition(".")[0] for name in imports(source, nested=True)}
    assert inside - STANDARD <= allowed(path) | allowed_lazily(path)


@pytest.mark.parametrize("path", EVERY, ids=name_of)
def test_the_layers_are_for_export_alone(path: Path) -> None:
    name = name_of(path)
    nn = [
        found for found in imports(path.read_text(encoding="utf-8"), nested=True) if found.startswith("fedpara_edge.nn")
    ]
    assert not nn or path == FACE or name.startswith(("export", "fedpara_edge.nn"))


@pytest.mark.parametrize("package", ["fedpara_edge", "device_runtime"])
def test_importing_brings_in_nothing_heavy(package: str) -> None:
    names = [
        name_of(path)
        for path in modules(package)
        if not {"nn", "trust"} & set(path.relative_to(ROOT).parts)
        and path.name not in ("__main__.py", "accounting.py", *DRAWING, *WITH_ONNXRUNTIME, *WEB)
        and not (path.parent.name == "torchengine" and path.name in WITH_TORCH)
        and not (path.parent.name == "fleet" and path.name in WITH_FLEET)
    ]
    heavy = {
        "flwr",
        "ray",
        "torch",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "zstandard",
        "matplotlib",
        "PIL",
        "pyarrow",
        "soundfile",
        "starlette",
        "uvicorn",
        "segno",
    }
    code = f"import {', '.join(names)}, sys\nheavy = {heavy | SIGNING} & sys.modules.keys()\nassert not heavy, heavy"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_the_engines_bring_in_neither_torch_nor_onnx(engine: str) -> None:
    heavy = "heavy = {'torch', 'onnx'} & sys.modules.keys()"
    module = ENGINES[engine].module
    code = f"import {module}, sys\n{heavy}\nassert not heavy, heavy\nimport onnxruntime.training"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


WITH_PICKLE = {
    "pretrained.py": "the error of a state dict",
    "apart.py": "the pipes to the exporter's second process",
    "simulated.py": "the messages between a simulation and its actors",
}


def test_no_file_is_a_pickle() -> None:
    for path in EVERY:
        names = set(imports(path.read_text(encoding="utf-8"), nested=True))
        assert path.name in WITH_PICKLE or not {"pickle", "dill", "joblib"} & names, path
