"""The engine `torch`: what it computes is what the device runtime's engine does, also where steps are recorded."""

import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from norms import relative_error
from small_net import without_verification

from device_runtime.config import TrainConfig
from device_runtime.data import open_data
from device_runtime.engines.protocol import Adjustment, Engine
from device_runtime.engines.registry import open_engine as open_device_engine
from device_runtime.training import train as run_training
from export import make_bundle
from fedpara_edge.errors import FedparaError, InputError, WrongBundleError
from fedpara_edge.formats.bundle import WEIGHTS, Bundle
from fedpara_edge.formats.recipe import Recipe
from fedpara_edge.simulation.torchengine import device
from fedpara_edge.simulation.torchengine.choice import EngineChoice, TorchSource
from fedpara_edge.simulation.torchengine.engine import TorchEngine, open_engine
from fedpara_edge.simulation.torchengine.stopping import stopping

MODELS = Path(__file__).with_name("torch_models.py")
IMAGE, VECTOR = (3, 6, 6), (12,)
TORCH = EngineChoice(engine="torch")
ROWS = 16
CLOSE = 2e-5
"""Largest relative difference of what some steps change, between float32 in torch and in onnxruntime."""
MOMENTUM: dict[str, Any] = {"momentum": 0.9}
ADAMW: dict[str, Any] = {"optimizer": "adamw", "weight_decay": 0.1, "betas": (0.8, 0.99), "eps": 1e-4}

CASES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "sgd": ("plain", IMAGE, {"gamma": 0.5}),
    "momentum": ("plain", IMAGE, {"kind": "pfedpara", "gamma": 0.5, **MOMENTUM}),
    "adamw": ("plain", IMAGE, {"kind": "lowrank", "gamma": 0.3, **ADAMW}),
    "pixels": (
        "plain",
        IMAGE,
        {"input_dtype": "uint8", "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "tanh": True},
    ),
    "running statistics": ("normalized", IMAGE, {"batchnorm": "train", **MOMENTUM}),
    "fixed statistics": ("normalized", IMAGE, {"batchnorm": "freeze"}),
    "statistics of batches": ("normalized_by_batches", IMAGE, {}),
    "frozen": ("plain", IMAGE, {"freeze": ("0",), **ADAMW}),
    "personal": ("plain", IMAGE, {"personal": ("5",)}),
    "labels that don't count": (
        "plain",
        IMAGE,
        {"loss": ("cross_entropy:ignore_index=4,class_weights=1,2,0.5,3,1,label_smoothing=0.1",)},
    ),
    "two heads": ("TwoHeads", VECTOR, {"loss": ("age=huber:delta=0.5,weight=0.3", "kind=cross_entropy")}),
    "own loss": ("Drawing", VECTOR, {"loss": (f"{MODELS}:focal:kind=classes",)}),
    "Jacobian correction": ("plain", IMAGE, {"gamma": 0.5, "jacobian_correction": 1.0}),
    "Frobenius decay": ("plain", IMAGE, {"gamma": 0.5, "frobenius_decay": 0.1}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Bundle, TorchSource]]:
    """Bundle of a case, and what the engine is made from."""

    @cache
    def make(case: str) -> tuple[Bundle, TorchSource]:
        factory, shape, options = CASES[case]
        recipe = recipe_of(factory, shape, **options)
        return bundle_of(recipe, tmp_path_factory.mktemp("bundle"))

    return make


def recipe_of(factory: str, shape: tuple[int, ...], **options: Any) -> Recipe:
    return Recipe(**{"name": f"{MODELS}:{factory}", "input_shape": shape, "engines": ("onnxruntime",), **options})


def bundle_of(recipe: Recipe, folder: Path) -> tuple[Bundle, TorchSource]:
    with without_verification():
        bundle = make_bundle(recipe, folder / "bundle").bundle
    return bundle, TorchSource(recipe=recipe, choice=TORCH, batch_rows=ROWS)


def batches(bundle: Bundle, *sizes: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    generator = np.random.default_rng(0)
    made = []
    for size in sizes:
        arrays = []
        for specs in (bundle.interface.inputs, bundle.interface.labels):
            values = {}
            for spec in specs:
                shape = (size, *spec.shape)
                numbers = generator.standard_normal(shape, np.float32)
                whole = generator.integers(0, spec.classes or 256, shape)
                values[spec.name] = numbers if spec.dtype == "float32" else whole.astype(spec.dtype)
            arrays.append(values)
        made.append((arrays[0], arrays[1]))
    return made


def train(
    engine: Engine, *sizes: int, adjustment: Adjustment | None = None, micro_batches: int = 1, rate: float = 0.02
) -> list[float]:
    given = {} if adjustment is None else {"adjustment": adjustment}
    return [
        engine.step(x, y, learning_rate=rate, seed=number, micro_batches=micro_batches, **given)
        for number, (x, y) in enumerate(batches(engine.bundle, *sizes))
    ]


def change(engine: Engine, before: dict[str, Any]) -> np.ndarray:
    return np.concatenate([np.ravel(tensor - before[name]) for name, tensor in engine.read().items()])


def assert_alike(one: Engine, other: Engine, *sizes: int, **options: Any) -> None:
    before = one.read()
    losses = [train(engine, *sizes, **options) for engine in (one, other)]
    np.testing.assert_allclose(*losses, rtol=CLOSE)
    assert relative_error(change(one, before), change(other, before)) < CLOSE
    ((x, y),) = batches(one.bundle, 9)
    found, expected = one.evaluate(x, y), other.evaluate(x, y)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=CLOSE)
    for name, output in expected.outputs.items():
        assert relative_error(found.outputs[name], output) < CLOSE


Made = Callable[[str], tuple[Bundle, TorchSource]]


@pytest.mark.parametrize("case", CASES)
def test_it_trains_as_the_device_does(case: str, made: Made) -> None:
    bundle, source = made(case)
    assert_alike(open_engine(bundle, source), open_device_engine(bundle, "onnxruntime", threads=1), 16, 16, 7, 16)


@pytest.mark.parametrize("case", ["sgd", "momentum", "adamw"])
def test_adjusted_gradients_and_micro_batches_are_the_device_s(case: str, made: Made) -> None:
    bundle, source = made(case)
    tensors = bundle.manifest.layout.trained
    generator = np.random.default_rng(1)
    h = {tensor.name: generator.standard_normal(tensor.shape, np.float32) / 10 for tensor in tensors}
    some = [tensor.name for tensor in tensors[::2]]
    for adjustment in (Adjustment(mu=0.3, h=h), Adjustment(mu=0.3, mu_of=some, max_norm=0.5), Adjustment(max_norm=0.1)):
        one, other = open_engine(bundle, source), open_device_engine(bundle, "onnxruntime", threads=1)
        assert_alike(one, other, 16, 9, 16, adjustment=adjustment, micro_batches=3)


@pytest.mark.parametrize("case", ["momentum", "adamw", "running statistics"])
def test_a_state_goes_on_to_the_same_bits(case: str, made: Made) -> None:
    bundle, source = made(case)
    one, again = open_engine(bundle, source), open_engine(bundle, source)
    train(one, 16, 7)
    state = one.state()
    losses = train(one, 16, 16)
    train(again, 7, 7, 7)
    again.restore(state)
    assert train(again, 16, 16) == losses
    for name, tensor in one.read().items():
        np.testing.assert_array_equal(tensor, again.read()[name])


def test_an_interrupted_call_goes_on_to_the_same_update(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, source = made("momentum")
    ((x, y),) = batches(bundle, 50)
    np.savez(tmp_path / "d.npz", **x, **y)
    data, config = open_data(tmp_path / "d.npz", bundle.manifest), TrainConfig(epochs=2, batch_size=ROWS, save_steps=1)

    def call(name: str) -> bytes:
        output = tmp_path / f"{name}.safetensors"
        options = {"output": output, "state": tmp_path / name, "client": "c"}
        result = run_training(open_engine(bundle, source), data, bundle.file(WEIGHTS), config, **options)
        assert result.resumed_from_step == (3 if name == "cut" else 0)
        return output.read_bytes()

    whole, step, steps = call("whole"), TorchEngine.step, 0

    def interrupted(engine: TorchEngine, *arguments: Any, **options: Any) -> float:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt
        return step(engine, *arguments, **options)

    monkeypatch.setattr(TorchEngine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call("cut")
    assert call("cut") == whole


@pytest.mark.slow
def test_dropout_comes_from_the_seed_and_is_left_out_of_evaluation(tmp_path: Path) -> None:
    bundle, source = bundle_of(recipe_of("dropping", IMAGE), tmp_path)
    one, other = open_engine(bundle, source), open_engine(bundle, source)
    ((x, y),) = batches(bundle, 16)
    torch.manual_seed(3)
    first = one.step(x, y, learning_rate=0.0, seed=5)
    assert other.step(x, y, learning_rate=0.0, seed=5) == first
    assert other.step(x, y, learning_rate=0.0, seed=6) != first
    device_s = open_device_engine(bundle, "onnxruntime", threads=1)
    np.testing.assert_allclose(one.evaluate(x, y).losses, device_s.evaluate(x, y).losses, rtol=CLOSE)
    losses = [one.step(x, y, learning_rate=0.0, seed=seed) for seed in range(200)]
    expected = [device_s.step(x, y, learning_rate=0.0, seed=seed) for seed in range(200)]
    spread = np.std(expected) / 200**0.5
    assert abs(np.mean(losses) - np.mean(expected)) < 5 * spread, "the masks are others, of the same share"


def test_attention_draws_no_mask_that_does_not_come_from_the_seed(tmp_path: Path) -> None:
    """Kernels of GPUs that fuse attention with its dropout are off where masks are drawn."""
    engine = open_engine(*bundle_of(recipe_of("dropping", IMAGE), tmp_path))
    with engine._drawing():
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.cuda.mem_efficient_sdp_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_single_row_may_lose_its_axis(tmp_path: Path) -> None:
    bundle, source = bundle_of(recipe_of("Squeezed", IMAGE), tmp_path)
    assert_alike(open_engine(bundle, source), open_device_engine(bundle, "onnxruntime", threads=1), 16, 1, 16)


class Recorded:
    """A graph that calls what was recorded, whatever was to be called."""

    count = 0

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        Recorded.count += 1

    def replay(self) -> None:
        self._function()


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are recorded as on a GPU."""

    def record(lane: device.Lane, key: Any, function: Callable[[], None]) -> Recorded:
        lane._graphs[key] = graph = Recorded(function)  # type: ignore[assignment]
        return graph

    monkeypatch.setattr(device.Lane, "records", True)
    monkeypatch.setattr(device.Lane, "_record", record)
    Recorded.count = 0


@pytest.mark.usefixtures("recording")
@pytest.mark.parametrize("case", ["momentum", "labels that don't count", "running statistics", "two heads", "own loss"])
def test_a_recorded_step_is_the_same(case: str, made: Made) -> None:
    """All that changes is in tensors that stay; last batches are filled up with rows that don't count."""
    bundle, source = made(case)
    one = open_engine(bundle, source)
    assert_alike(one, open_device_engine(bundle, "onnxruntime", threads=1), 16, 16, 7, 16, 3, 16)
    assert Recorded.count == 2, "the gradient of a whole batch, and the update"


@pytest.mark.usefixtures("recording")
def test_rows_that_depend_on_each_other_are_not_filled_up(tmp_path: Path) -> None:
    bundle, source = bundle_of(recipe_of("Centred", VECTOR), tmp_path)
    assert_alike(open_engine(bundle, source), open_device_engine(bundle, "onnxruntime", threads=1), 16, 7, 5, 16)


def test_the_bundle_must_be_of_the_recipe(made: Made) -> None:
    bundle, source = made("sgd")
    other = TorchSource(recipe=made("adamw")[1].recipe, choice=TORCH, batch_rows=ROWS)
    with pytest.raises(WrongBundleError, match="expected the tensors of its recipe, found others; make it again"):
        open_engine(bundle, other)
    assert open_engine(bundle, source).name == "torch"


def test_what_torch_refuses_is_one_line(made: Made) -> None:
    bundle, source = made("sgd")
    engine = open_engine(bundle, source)
    x = np.zeros((4, 3, 5), np.float32)
    with pytest.raises(FedparaError, match=r"engine torch: expected to run on 4 rows, found [^\n]*; fewer clients at"):
        engine.step(x, np.zeros(4, np.int64), learning_rate=0.1, seed=0)


def test_a_missing_gpu_is_refused(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bundle, source = made("sgd")
    gpu = TorchSource(recipe=source.recipe, choice=EngineChoice(engine="torch", device="cuda"), batch_rows=ROWS)
    with pytest.raises(InputError, match="device: expected a GPU that torch can use, found none; install torch for it"):
        open_engine(bundle, gpu)


def test_bfloat16_is_as_close_as_its_digits(made: Made) -> None:
    bundle, source = made("sgd")
    rounded = TorchSource(recipe=source.recipe, choice=EngineChoice(engine="torch", precision="bf16"), batch_rows=ROWS)
    one, other = open_engine(bundle, rounded), open_engine(bundle, source)
    before = one.read()
    for engine in (one, other):
        train(engine, 16, 16)
    assert 1e-4 < relative_error(change(one, before), change(other, before)) < 0.05


def test_trainings_stop_when_asked(made: Made) -> None:
    engine = open_engine(*made("sgd"))
    stopping.set()
    try:
        with pytest.raises(KeyboardInterrupt):
            train(engine, 16)
    finally:
        stopping.clear()


def test_nothing_happens_beside_what_is_recorded() -> None:
    sharing, alone, seen = device._Sharing(), 0, []

    def work(records: bool) -> None:
        nonlocal alone
        for _ in range(20):
            with sharing.shared():
                seen.append(alone)
                if records:
                    with sharing.alone():
                        alone += 1
                        time.sleep(0.0005)
                        seen.append(alone - 1)
                        alone -= 1

    threads = [threading.Thread(target=work, args=(number < 3,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in threads)
    assert not any(seen)
    assert len(seen) == 20 * (6 + 3)
