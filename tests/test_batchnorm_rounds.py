"""Whole rounds of bundles whose BatchNorms have running statistics: interrupted, inspected, simulated."""

import json
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Command
from small_net import without_verification
from test_statistics import STATISTICS, export, local_round, write_data
from tiny_plan import AtOnce, measured, write_plan

from device_runtime import TrainConfig, evaluate, load_weights, open_data, open_engine, train
from device_runtime.engines.registry import ENGINES
from fedpara_edge.aggregation import aggregate
from fedpara_edge.codecs import find_encoder
from fedpara_edge.formats.bundle import WEIGHTS, Bundle, open_bundle
from fedpara_edge.formats.weights import read_weights, write_weights
from fedpara_edge.simulation.folder import RunFolder
from fedpara_edge.simulation.runner import simulate

pytestmark = pytest.mark.slow

choices = pytest.mark.parametrize("choice", ["train", "local"])


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    return {choice: export(folder / choice, choice) for choice in ("train", "local")}


@pytest.mark.parametrize("engine", ENGINES)
@choices
def test_an_interrupted_training_resumes_to_the_very_same_statistics(
    choice: str, engine: str, bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    bundle = bundles[choice]
    data = open_data(write_data(tmp_path / "data.npz", shift=3.0), bundle.manifest)

    def run(folder: Path, stop: int | None = None) -> None:
        def on_step(step: int, _: int, __: float) -> None:
            if step == stop:
                signal.raise_signal(signal.SIGINT)

        train(
            open_engine(bundle, engine, threads=1),
            data,
            bundle.file(WEIGHTS),
            TrainConfig(batch_size=8, lr=0.05, epochs=2),
            output=folder / "update",
            encoder=find_encoder("int4"),
            state=folder / "state",
            client="a",
            on_step=on_step,
        )

    folders = [tmp_path / name for name in ("whole", "torn")]
    for folder in folders:
        folder.mkdir()
    run(folders[0])
    for stop in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            run(folders[1], stop)
    run(folders[1])
    for name in ("update", "state/lasting.safetensors"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


@pytest.mark.parametrize("codec", ["topk:share=0.01", "uniform", "int2", "adaptive:error=0.5"])
def test_statistics_of_every_round_are_those_of_the_devices_whatever_else_is_left_out(
    codec: str, bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    weights = read_weights(bundles["train"].file(WEIGHTS))
    for number in range(3):
        start = tmp_path / f"round-{number}.safetensors"
        write_weights(start, weights)
        updates = {}
        for each in (codec, "float32"):
            folder = tmp_path / f"{each}-{number}"
            shutil.copytree(tmp_path / f"{each}-{number - 1}", folder) if number else folder.mkdir()
            for old in folder.glob("*.safetensors"):
                old.unlink()
            more = {"codec": each, "weights": start, "epochs": 4}
            updates[each] = [
                local_round(bundles["train"], folder, f"c{n}", seed=n, shift=4.0 * n, **more) for n in range(2)
            ]
        expected, weights = (aggregate(updates[each], weights).weights for each in ("float32", codec))
        for name in STATISTICS:
            np.testing.assert_allclose(weights.tensors[name], expected.tensors[name], rtol=0.01, atol=0.005)
            assert "var" not in name or weights.tensors[name].min() > 0


def test_a_local_batchnorm_goes_on_from_its_own_statistics(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    bundle = bundles["local"]
    engine = open_engine(bundle, "onnxruntime", threads=1)
    weights, initial, seen = read_weights(bundle.file(WEIGHTS)), bundle.read_initial_personal(), []
    for number in range(3):
        path = tmp_path / f"round-{number}.safetensors"
        write_weights(path, weights)
        update = local_round(bundle, tmp_path, "a", shift=5.0, weights=path)
        load_weights(engine, path, state=tmp_path / "a")
        seen.append(engine.read()["1.running_mean"])
        weights = aggregate([update], weights).weights
        update.unlink()
    # 3 batches a round close each a tenth of the distance to the device's own mean, which the weights hardly move.
    moved = [np.abs(mean - initial["1.running_mean"]).max() for mean in seen]
    assert moved[0] < 0.7 * moved[2]
    assert moved[0] < moved[1] < moved[2]


@choices
def test_inspect_tells_parts_and_roles(choice: str, bundles: dict[str, Bundle], tmp_path: Path, run: Command) -> None:
    bundle = bundles[choice]
    update = local_round(bundle, tmp_path, "a", codec="int4")
    for path in (bundle.path, bundle.file(WEIGHTS), update, tmp_path / "a"):
        assert run("inspect", str(path)).code == 0, path
    told = json.loads(run("inspect", str(update), "--weights", str(bundle.file(WEIGHTS)), "--json").out)
    bits = {tensor["name"]: tensor["bits"] for tensor in told["encoded"]}
    assert {name for name, each in bits.items() if each == 16} == (set(STATISTICS) if choice == "train" else set())


NET = """
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 6, 2, groups=6, bias=False),
        nn.BatchNorm2d(6, affine=False), nn.ReLU6(), nn.Flatten(), nn.Linear(6, 3))
"""
ARMS = """
[arms.running]
model.batchnorm = "train"
[arms.sparse]
model.batchnorm = "train"
train.codec = "topk:share=0.3"
aggregate.downlink_codec = "int4"
aggregate.algorithm = "fedadam:lr=0.1"
[arms.scaffold]
model.batchnorm = "train"
train.algorithm = "scaffold"
aggregate.algorithm = "scaffold"
[arms.own]
model.batchnorm = "local"
"""


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("simulated")
    (place / "net.py").write_text(NET)
    changes = (
        ('name = "mlp"\nclasses = 3\n', f'name = "{place / "net.py"}:net"\nkind = "dense"\ninput_dtype = "uint8"\n'),
        ('test = ["x_test", "y_test"]', "test_share = 0.3"),
        ('[arms.dense]\nmodel.kind = "dense"\n[arms.small]\nmodel.gamma = 0.5\ntrain.codec = "int8"\n', ""),
        ("[arms.alone]\nmodel.gamma = 0.5\n", '[arms.alone]\nmodel.batchnorm = "train"\n'),
        ("rounds = 2", "rounds = 4"),
        ("batch_size = 8", "batch_size = 4\nepochs = 6"),
    )
    plan = write_plan(place, *changes, more=ARMS)
    with pytest.MonkeyPatch.context() as patched, without_verification():
        patched.setattr("fedpara_edge.simulation.runner.open_pool", lambda *_, **__: nullcontext(AtOnce()))
        simulate(plan, place / "run")
    return place / "run"


def last(run: Path, arm: str, event: str = "round") -> dict[str, Any]:
    return [line for line in measured(run) if (line["arm"], line["event"]) == (arm, event)][-1]


@pytest.mark.parametrize("arm", ["running", "sparse", "scaffold", "own", "alone"])
def test_a_plan_learns_with_running_statistics(arm: str, simulated: Path) -> None:
    found = last(simulated, arm)
    assert (found["round"], found["rejected"]) == (4, 0)
    assert found["accuracy"] > 0.7


def test_clients_of_a_plan_are_evaluated_with_their_own_batchnorms(simulated: Path) -> None:
    job, each = RunFolder(simulated).job("own", 4), last(simulated, "own", "clients")
    bundle, data = open_bundle(job.bundle), simulated / "work" / ".data" / "seed-4" / "clients"
    assert len(each["clients"]) == 3
    for name, score in each["clients"].items():
        engine = open_engine(bundle, "onnxruntime", threads=1)
        load_weights(engine, job.weights(4), state=job.state(name))
        assert evaluate(engine, open_data(data / name / "test", bundle.manifest), 256).loss == score["loss"]
