"""Settings of all tests, and what is slow to make and shared by several."""

import copy
import functools
import gc
import os
import sys
import typing
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_plan
import torch
import training_device
from command_line import Command, Ended
from hypothesis import settings
from small_net import SmallBundle, export_small_net
from torch._export import utils
from torch.onnx._internal.exporter._registration import ONNXRegistry

from fedpara_edge.aggregation.effort import USUAL, Effort
from fedpara_edge.cli import main
from fedpara_edge.codecs import codec
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.report import figures
from fedpara_edge.simulation import runner
from fedpara_edge.simulation.tasks.engines import bundle_at

settings.register_profile("tests", deadline=None)  # how long an example takes depends on what else runs here
settings.load_profile("tests")
torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other
gc.freeze()  # torch is large, stays, and need not be searched for garbage again and again


LONGEST = (
    "test_fleet_up.py",
    "test_hostile_arguments.py",
    "test_readme.py",
    "test_benchmarks_run.py",
    "test_kills.py",
    "test_flower_simulation.py",
    "test_mobilenet.py",
    "test_training_engines.py",
    "test_training_step.py",
    "test_export.py",
    "test_fold.py",
    "test_fold_precision.py",
    "test_power_cuts.py",
    "test_packaging.py",
    "test_draws.py",
    "test_simulation.py",
    "test_recurrent_bundles.py",
    "test_gradient_coverage.py",
    "test_zoo.py",
)
"""Test files that take the longest, which begin first so that no worker is left with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files of `LONGEST` before all others."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session", autouse=True)
def _fast_disk() -> Iterator[None]:
    """No waiting for the disk; what happens where a sync fails is tested with `failing_disk`."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _fast_exports() -> Iterator[None]:
    """What torch does anew for each export, and is most of the time of a small one, is done once.

    That is torch.onnx's table of operators, torch.export's look at all operators of C++, and the annotation of each
    kernel that it registers, which only `typing` remembers.
    """
    make = functools.cache(ONNXRegistry.from_torchlib)

    def copied(**options: Any) -> ONNXRegistry:
        table = copy.copy(make(**options))
        table.functions = {operator: [*found] for operator, found in table.functions.items()}
        return table

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ONNXRegistry, "from_torchlib", staticmethod(copied))
        patched.setattr(utils, "_materialize_cpp_cia_ops", functools.cache(utils._materialize_cpp_cia_ops))
        patched.setattr(torch._ops, "Callable", typing.Callable)
        yield


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> SmallBundle:
    """`small_net.SmallBundle`; each is exported once, so a test that spoils one makes itself a copy."""

    @functools.cache
    def export(optimizer: str = "sgd", dropout: float = 0.0) -> Bundle:
        return export_small_net(tmp_path_factory.mktemp("small") / "bundle", optimizer, dropout=dropout)

    return export


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `fedpara-edge` with arguments, in this process."""

    def call(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["fedpara-edge", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Ended(int(ended.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def here(small_bundle: SmallBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the small bundle and data for it, `d.npz`."""
    monkeypatch.chdir(tmp_path)
    bundle = small_bundle()
    Path("bundle").symlink_to(bundle.path)
    shape = bundle.interface.inputs[0].shape
    np.savez("d.npz", x=np.random.default_rng(0).random((8, *shape), np.float32), y=np.arange(8) % 3)
    return tmp_path


@pytest.fixture(scope="session")
def device_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle and data for `training_device.Device`."""
    folder = tmp_path_factory.mktemp("device inputs")
    training_device.make_inputs(folder)
    return folder


@pytest.fixture(scope="session")
def undisturbed(device_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """The bytes of a call of `training_device.Device` without any interruption."""
    device = training_device.Device(device_inputs, tmp_path_factory.mktemp("undisturbed device"))
    device.train()
    found: tuple[bytes, bytes] = device.result()
    return found


@pytest.fixture(params=["as they are", "small blocks and chunks"])
def effort(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Effort:
    """Effort of an aggregation: what is usual, or blocks and chunks so small that a round has several."""
    if request.param == "as they are":
        return USUAL
    monkeypatch.setattr(codec, "CHUNK_ENTRIES", 16)
    return Effort(block_files=3)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker processes: fast, and open to monkeypatching."""

    @contextmanager
    def open_pool(*_: Any, **__: Any) -> Iterator[Executor]:
        yield tiny_plan.AtOnce()

    monkeypatch.setattr(runner, "open_pool", open_pool)
    bundle_at.cache_clear()


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if matplotlib was not installed, which also makes a report in no time."""
    monkeypatch.setattr(figures, "find_spec", lambda name: None if name == "matplotlib" else object())
