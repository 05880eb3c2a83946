"""Every engine trains like torch, deterministically, and goes on exactly where it was saved."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import small_round
import torch
from norms import relative_error
from small_net import OPTIMIZERS, SHAPE, Batches, SmallBundle, batches, small_net
from torch import nn
from zoo_training import (
    ZOO_CASES,
    Rounding,
    Torch,
    ZooBundle,
    step_error,
    to_torch,
    zoo_batches,
    zoo_bundles,
    zoo_model,
)

from device_runtime import Adjustment, open_engine
from device_runtime.engines.protocol import NONE, Engine
from device_runtime.engines.registry import ENGINES
from fedpara_edge.errors import FedparaError, InputError
from fedpara_edge.nn import ZOO

STEPS = 50
TOLERANCE = 1e-4
RATES = {"sgd": 0.05, "momentum": 0.02, "adamw": 0.002}

every_engine = pytest.mark.parametrize("engine", ENGINES)
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def random_h(model: nn.Module) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(7)
    return {
        name: 0.05 * generator.standard_normal(tensor.shape, dtype=np.float32)
        for name, tensor in model.named_parameters()
        if not name.startswith("1.")  # what h leaves out is zero
    }


ADJUSTMENTS: dict[str, Any] = {
    "as it is": lambda _: NONE,
    "clipped": lambda _: Adjustment(max_norm=0.7),
    "towards zero": lambda _: Adjustment(mu=0.05),
    "shifted": lambda model: Adjustment(h=random_h(model)),
    "all at once": lambda model: Adjustment(max_norm=1.6, mu=0.05, h=random_h(model)),
}


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("adjusted", ADJUSTMENTS)
@every_optimizer
def test_fifty_steps_agree_with_torch(
    optimizer: str, adjusted: str, micro_batches: int, small_bundle: SmallBundle
) -> None:
    model = small_net()
    bundle = small_bundle(optimizer)
    adjustment = ADJUSTMENTS[adjusted](model)
    reference = Torch(model, optimizer, RATES[optimizer])
    engines = [open_engine(bundle, name, threads=1) for name in ENGINES]
    settings = {"learning_rate": RATES[optimizer], "seed": 0, "adjustment": adjustment, "micro_batches": micro_batches}
    for x, y in batches(STEPS):
        expected = reference.step(torch.from_numpy(x), torch.from_numpy(y), adjustment)
        for engine in engines:
            assert engine.step(x, y, **settings) == pytest.approx(expected, rel=TOLERANCE), engine.name
    for engine in engines:
        for name, tensor in engine.read().items():
            assert relative_error(tensor, model.state_dict()[name].numpy()) < TOLERANCE, (engine.name, name)
    if reference.norms:
        assert min(reference.norms) < adjustment.max_norm < max(reference.norms)


@pytest.fixture(scope="module")
def zoo_bundle(tmp_path_factory: pytest.TempPathFactory) -> ZooBundle:
    return zoo_bundles(tmp_path_factory.mktemp("zoo"))


ZOO_RATES = {"sgd": 0.1, "momentum": 0.05, "adamw": 0.002}
SMALL_RATES = {"sgd": 2e-4, "momentum": 5e-5, "adamw": 1e-5}


def test_the_whole_zoo_is_trained() -> None:
    mobilenets = {name for name in ZOO if name.startswith("mobilenet")}  # trained in `test_mobilenet.py`
    assert ZOO_CASES.keys() == ZOO.keys() - mobilenets


@pytest.mark.slow
@every_optimizer
@pytest.mark.parametrize("name", ZOO_CASES)
def test_each_of_fifty_steps_of_the_zoo_is_torchs(name: str, optimizer: str, zoo_bundle: ZooBundle) -> None:
    # At usual learning rates. All engines start every step from torch's weights and state, as a ReLU or a maximum that
    # falls on the other side, by rounding alone, would lead the steps after it astray.
    bundle = zoo_bundle(name, optimizer)
    rate = ZOO_CASES[name].rate * ZOO_RATES[optimizer]
    reference = Torch(zoo_model(name), optimizer, rate)
    engines = [open_engine(bundle, engine, threads=1) for engine in ENGINES]
    rounded = dict.fromkeys(ENGINES, 0)
    for x, y in zoo_batches(name, STEPS):
        before, old = copy.deepcopy(reference), reference.values()
        inputs, labels = to_torch(x), torch.from_numpy(y)
        rounding = Rounding(before, inputs, labels)
        expected = reference.step(inputs, labels)
        changes = {tensor: value - old[tensor] for tensor, value in reference.values().items()}
        for engine in engines:
            engine.restore(before.state_for(engine, bundle))
            loss = engine.step(x, y, learning_rate=rate, seed=0)
            assert loss == pytest.approx(expected, rel=TOLERANCE), engine.name
            found = {tensor: value - old[tensor] for tensor, value in engine.read().items()}
            if step_error(found, changes) > TOLERANCE:
                assert rounding.explains(found, TOLERANCE), engine.name
                rounded[engine.name] += 1
    assert max(rounded.values()) <= 0.75 * STEPS  # a wrong step would differ every time


@pytest.mark.slow
@every_optimizer
@pytest.mark.parametrize("name", ZOO_CASES)
def test_fifty_steps_of_the_zoo_in_a_row_agree_with_torch(name: str, optimizer: str, zoo_bundle: ZooBundle) -> None:
    # At small learning rates, for the same reason. So that little movement is not mistaken for agreement, the movement
    # is compared as well.
    bundle, model = zoo_bundle(name, optimizer), zoo_model(name)
    rate = ZOO_CASES[name].small_rate * SMALL_RATES[optimizer]
    initial = small_round.flat(dict(model.state_dict()))
    reference = Torch(model, optimizer, rate)
    engines = [open_engine(bundle, engine, threads=1) for engine in ENGINES]
    for x, y in zoo_batches(name, STEPS):
        expected = reference.step(to_torch(x), torch.from_numpy(y))
        for engine in engines:
            loss = engine.step(x, y, learning_rate=rate, seed=0)
            assert loss == pytest.approx(expected, rel=TOLERANCE), engine.name
    trained = small_round.flat(dict(model.state_dict()))
    for engine in engines:
        found = small_round.flat(engine.read())
        assert relative_error(found, trained) < TOLERANCE, engine.name
        assert relative_error(found - initial, trained - initial) < 0.05, engine.name


def run(engine: Engine, data: Batches, first: int = 0, **settings: Any) -> list[float]:
    return [engine.step(x, y, learning_rate=0.01, seed=first + i, **settings) for i, (x, y) in enumerate(data)]


@pytest.mark.parametrize("micro_batches", [1, 2])
@every_optimizer
@every_engine
def test_a_restored_engine_goes_on_to_the_same_bits(
    engine: str, optimizer: str, micro_batches: int, small_bundle: SmallBundle
) -> None:
    bundle = small_bundle(optimizer, 0.3)
    settings = {"adjustment": Adjustment(max_norm=1.0, mu=0.1, h=random_h(small_net())), "micro_batches": micro_batches}
    data = batches(10)
    whole = open_engine(bundle, engine, threads=1)
    losses = run(whole, data, **settings)
    part = open_engine(bundle, engine, threads=1)
    run(part, data[:4], **settings)
    state = part.state()
    run(part, data[:2])  # the state is a copy
    later = open_engine(bundle, engine, threads=1)
    later.restore(state)
    assert run(later, data[4:], first=4, **settings) == losses[4:]
    for name, tensor in whole.read().items():
        np.testing.assert_array_equal(later.read()[name], tensor)


@every_engine
def test_a_new_engine_starts_from_the_weights_of_the_bundle(engine: str, small_bundle: SmallBundle) -> None:
    model = small_net()
    bundle = small_bundle()
    opened = open_engine(bundle, engine)
    assert opened.bundle is bundle
    found = opened.read()
    assert found.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(found[name], tensor.numpy())


@every_engine
def test_dropout_follows_the_seed_and_is_off_in_evaluation(engine: str, small_bundle: SmallBundle) -> None:
    bundle = small_bundle("sgd", 0.5)
    (x, y), *_ = batches(2)
    training = open_engine(bundle, engine)
    same, other = (training.step(x, y, learning_rate=1e-30, seed=seed) for seed in (1, 2))
    again = training.step(x, y, learning_rate=1e-30, seed=1)
    assert same == again != other
    assert training.evaluate(x, y).losses == training.evaluate(x, y).losses


@every_engine
def test_micro_batches_draw_their_own_dropout(engine: str, small_bundle: SmallBundle) -> None:
    training = open_engine(small_bundle("sgd", 0.5), engine, threads=1)
    (x, y), *_ = batches(2)
    once = training.step(x, y, learning_rate=1e-30, seed=1)
    settings = {"learning_rate": 1e-30, "seed": 1, "micro_batches": 2}
    twice = [training.step(np.concatenate([x, x]), np.concatenate([y, y]), **settings) for _ in range(2)]
    assert twice[0] == twice[1]
    assert twice[0] != pytest.approx(once, rel=1e-3)


@every_engine
def test_there_are_at_most_as_many_micro_batches_as_rows(engine: str, small_bundle: SmallBundle) -> None:
    bundle = small_bundle()
    (x, y), *_ = batches(2)
    many, rows = (open_engine(bundle, engine, threads=1) for _ in range(2))
    assert run(many, [(x, y)], micro_batches=1000) == run(rows, [(x, y)], micro_batches=16)


@every_engine
def test_loaded_tensors_are_read_back_and_used(engine: str, small_bundle: SmallBundle) -> None:
    training = open_engine(small_bundle(), engine)
    (x, y), *_ = batches(2)
    before = training.evaluate(x, y).outputs["logits"]
    tensors = {name: tensor * 2 for name, tensor in training.read().items()}
    training.load(tensors)
    for name, tensor in training.read().items():
        np.testing.assert_array_equal(tensor, tensors[name])
    assert not np.allclose(training.evaluate(x, y).outputs["logits"], before)


@every_engine
def test_evaluation_leaves_the_training_alone(engine: str, small_bundle: SmallBundle) -> None:
    bundle = small_bundle("adamw")
    data = batches(6)
    plain, evaluated = open_engine(bundle, engine, threads=1), open_engine(bundle, engine, threads=1)
    expected = run(plain, data)
    found = []
    for number, (x, y) in enumerate(data):
        evaluated.evaluate(x, y)
        found.append(evaluated.step(x, y, learning_rate=0.01, seed=number))
        evaluated.evaluate(x, y)
    assert found == expected


@every_engine
def test_an_adjustment_holds_for_its_step_only(engine: str, small_bundle: SmallBundle) -> None:
    bundle = small_bundle()
    (x, y), *_ = batches(2)
    plain, mixed = (open_engine(bundle, engine, threads=1) for _ in range(2))
    mixed.step(x, y, learning_rate=0.1, seed=0, adjustment=Adjustment(mu=1.0, h=random_h(small_net()), max_norm=0.1))
    mixed.load(plain.read())
    assert run(mixed, batches(4)) == run(plain, batches(4))


@every_engine
def test_an_h_that_does_not_fit_is_refused_by_name(engine: str, small_bundle: SmallBundle) -> None:
    training = open_engine(small_bundle(), engine)
    (x, y), *_ = batches(2)
    before = training.read()
    for h, words in (
        ({"7.x1": np.zeros((5, 3), np.float32)}, "tensor '7.x1': expected the name of a trained tensor"),
        ({"6.bias": np.zeros(4, np.float32)}, r"tensor '6.bias': expected shape \(5,\), found shape \(4,\)"),
    ):
        with pytest.raises(InputError, match=words):
            training.step(x, y, learning_rate=0.1, seed=0, adjustment=Adjustment(h=h))
    for name, tensor in training.read().items():
        np.testing.assert_array_equal(tensor, before[name])


@every_engine
def test_what_the_runtime_refuses_to_run_is_one_line(
    engine: str, small_bundle: SmallBundle, capfd: pytest.CaptureFixture[str]
) -> None:
    training = open_engine(small_bundle(), engine)
    wrong, y = np.zeros((3, 1, 9, 9), np.float32), np.zeros(3, np.int64)
    with pytest.raises(FedparaError, match=r"train.*\.onnx: expected to run on 3 rows, found [^\n]*; if it runs on"):
        training.step(wrong, y, learning_rate=0.1, seed=0)
    with pytest.raises(FedparaError, match=r"eval.*\.onnx: expected to run on 3 rows, found "):
        training.evaluate(wrong, y)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("field", [{"max_norm": 0.0}, {"max_norm": math.nan}, {"mu": math.inf}, {"mu": math.nan}])
def test_adjustments_out_of_range_are_refused(field: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(field))}: expected a"):
        Adjustment(**field)


def test_batches_that_lie_elsewhere_in_memory_train_alike(small_bundle: SmallBundle) -> None:
    bundle = small_bundle()
    (x, y), *_ = batches(2)
    for name in ENGINES:
        plain, strided = (open_engine(bundle, name, threads=1) for _ in range(2))
        assert run(strided, [(np.asfortranarray(x), np.repeat(y, 2)[::2])], micro_batches=3) == run(
            plain, [(x, y)], micro_batches=3
        )
        assert x.shape == (16, *SHAPE)
