"""Simulations in torch: the same plan as on devices, with the same order, files and codecs, to the same metrics."""

import shutil
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import pytest
from begun_run import begin_run
from command_line import Command
from tiny_plan import AtOnce, measured, write_plan

from fedpara_edge.errors import InputError
from fedpara_edge.simulation import runner
from fedpara_edge.simulation.runner import simulate
from fedpara_edge.simulation.torchengine.choice import EngineChoice
from fedpara_edge.simulation.torchengine.engine import TorchEngine

pytestmark = pytest.mark.slow

TORCH = EngineChoice(engine="torch")
CLOSE = 1e-4
"""Largest relative difference of a loss or a norm after two rounds from that of the device runtime."""
ARMS = """
[arms.momentum]
model.kind = "dense"
model.momentum = 0.9
train.algorithm = "fedprox:mu=0.1"
train.clip_norm = 1.0
[arms.adamw]
model.gamma = 0.5
model.optimizer = "adamw"
train.lr = 0.003
train.codec = "int8"
aggregate.downlink_codec = "int8"
[arms.scaffold]
model.kind = "lowrank"
train.algorithm = "scaffold"
aggregate.algorithm = "scaffold"
[arms.personal]
model.kind = "pfedpara"
model.gamma = 0.5
[arms.update]
model.kind = "update"
model.base_momentum = 0.5
train.algorithm = "fedprox:mu=0.1"
[arms.alone]
model.gamma = 0.5
local_only = true
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a plan, its data, and a run folder that has nothing but the bundles."""
    place = tmp_path_factory.mktemp("plan")
    write_plan(place, more="")
    text = (place / "plan.toml").read_text()
    (place / "plan.toml").write_text(text[: text.index("[arms.dense]")] + ARMS)
    begin_run(place / "plan.toml", place / "new")
    return place


@pytest.fixture
def new(place: Path, tmp_path: Path) -> Path:
    """A run folder in which the bundles are made, which is slow."""
    shutil.copytree(place / "new", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def in_torch(place: Path) -> list[dict[str, Any]]:
    """What a whole run in torch measured."""
    shutil.copytree(place / "new", place / "torch")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runner, "open_pool", _at_once)
        simulate(place / "plan.toml", place / "torch", workers=1, engine=TORCH)
    return measured(place / "torch")


class _at_once:  # noqa: N801  # a context manager in the place of a function
    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> Executor:
        return AtOnce()

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.usefixtures("in_this_process")
def test_it_measures_what_the_device_runtime_does(in_torch: list[dict[str, Any]], place: Path, new: Path) -> None:
    simulate(place / "plan.toml", new, workers=1)
    on_device = measured(new)
    assert len(on_device) == len(in_torch)
    for expected, found in zip(on_device, in_torch, strict=True):
        engine = {"engine": "torch:cpu:float32"} if expected["event"] == "arm" else {}
        assert found.keys() == {**expected, **engine}.keys()
        assert found.items() >= engine.items()
        for key, value in expected.items():
            near = pytest.approx(value, rel=CLOSE, abs=1e-6) if isinstance(value, float) else value
            assert found[key] == near or is_size(key, expected), (found["arm"], key)
    assert {line["arm"] for line in in_torch} == {"momentum", "adamw", "scaffold", "personal", "update", "alone"}


def is_size(key: str, event: dict[str, Any]) -> bool:
    """Whether it is the size of files that are compressed, which depends on the last bit of what is in them."""
    return event["arm"] == "adamw" and key in ("up_bytes", "down_bytes", "weights_bytes", "change_bytes")


@pytest.mark.usefixtures("in_this_process")
def test_interrupted_it_goes_on_to_the_same_metrics(
    in_torch: list[dict[str, Any]], place: Path, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = TorchEngine.step, 0

    def interrupted(engine: TorchEngine, *arguments: Any, **options: Any) -> float:
        nonlocal steps
        steps += 1
        if steps in (7, 60):
            raise KeyboardInterrupt
        return step(engine, *arguments, **options)

    monkeypatch.setattr(TorchEngine, "step", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            simulate(place / "plan.toml", new, workers=1, engine=TORCH)
    simulate(place / "plan.toml", new, workers=1, engine=TORCH)
    assert measured(new) == in_torch


@pytest.mark.usefixtures("in_this_process")
def test_threads_that_share_a_device_measure_the_same(
    in_torch: list[dict[str, Any]], place: Path, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: one process, a thread and an engine for each client at a time."""
    monkeypatch.setattr(EngineChoice, "on_gpu", True)
    simulate(place / "plan.toml", new, workers=3, engine=TORCH)
    assert measured(new) == in_torch


@pytest.mark.usefixtures("in_this_process")
def test_threads_stop_with_the_run(place: Path, new: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineChoice, "on_gpu", True)
    step = TorchEngine.step

    def failing(engine: TorchEngine, *arguments: Any, **options: Any) -> float:
        if options["seed"] % 3 == 0:
            raise InputError("expected another seed")
        return step(engine, *arguments, **options)

    monkeypatch.setattr(TorchEngine, "step", failing)
    with pytest.raises(InputError, match=r"arms\..*, seed 4: expected another seed"):
        simulate(place / "plan.toml", new, workers=3, engine=TORCH)


@pytest.mark.usefixtures("in_this_process", "in_torch")
def test_a_run_keeps_its_engine(place: Path, new: Path) -> None:
    shutil.copy(place / "torch" / "metrics.jsonl", new)
    text = (new / "metrics.jsonl").read_text().splitlines(keepends=True)
    (new / "metrics.jsonl").write_text("".join(line for line in text if '"done"' not in line))
    with pytest.raises(
        InputError, match=r"^engine: expected torch:cpu:float32, with which .* has begun arm momentum, fo"
    ):
        simulate(place / "plan.toml", new, workers=1)
    bf16 = EngineChoice(engine="torch", precision="bf16")
    with pytest.raises(InputError, match="found torch:cpu:bf16; take another folder for another engine"):
        simulate(place / "plan.toml", new, workers=1, engine=bf16)


@pytest.mark.usefixtures("in_this_process", "in_torch")
def test_the_command(place: Path, run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    ended = run("simulate", "plan.toml", "-o", "torch", "--engine", "torch", "--json")
    assert ended.code == 0, ended.err
    ended = run("simulate", "plan.toml", "-o", "other", "--device", "cuda")
    assert ended.code == 2
    assert "--device: expected with engine torch" in ended.err
    assert not Path("other").exists()
