"""Laws of tuning: forms of a step that compute the same, and a choice that is measured once and kept."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from command_line import Command, check_refused
from norms import relative_error
from step_models import batch, net
from torch import nn

from device_runtime import Choice, Dataset, open_data, open_engine, open_tuned, tuning
from device_runtime.call import identity_of
from device_runtime.config import TrainCall
from device_runtime.engines.portable import Portable
from device_runtime.state import COMMITTED
from device_runtime.statefiles import Committed, write_committed
from device_runtime.tuning import FILE, GAIN, Way, choose
from export import export_bundle
from export.step import training_step
from fedpara_edge.aggregation import aggregate
from fedpara_edge.codecs import FLOAT32
from fedpara_edge.errors import FedparaError, InputError, WrongBundleError
from fedpara_edge.formats.bundle import FORMS, TRAIN_STEP, WEIGHTS, Bundle
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.formats.weights import read_weights

IMAGE = (32, 6, 6)
USUAL, OTHER, THIRD = Way("default", None), Way("direct", None), Way("direct", 1)
ENGINE, DIRECT = "onnxruntime", FORMS["direct"]
CALL = TrainCall(engine=ENGINE, batch_size=4, lr=0.05, tune=True)


def convolutions() -> nn.Module:
    """A model of small images, whose step has two forms."""
    torch.manual_seed(0)
    return net(nn.Conv2d(32, 32, 3, padding=1), nn.Tanh(), nn.Conv2d(32, 32, 3, padding=1), shape=IMAGE)


def exported(folder: Path, model: nn.Module, **options: Any) -> Bundle:
    config = ExportConfig(
        input_shape=IMAGE, input_dtype="float32", engines=(ENGINE,), **{"tunable": True, "seed": 0, **options}
    )
    return export_bundle(model, folder, config)[0]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """That model's bundle."""
    return exported(tmp_path_factory.mktemp("bundle") / "both", convolutions())


@pytest.fixture(scope="module")
def dataset(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Eight images."""
    path = tmp_path_factory.mktemp("data") / "images.npz"
    x, y = batch(IMAGE, 8)
    np.savez(path, x=x, y=y)
    return open_data(path, bundle.manifest)


def operators(bundle: Bundle, file: str) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(bundle.file(file)).graph.node)


def test_the_direct_form_keeps_every_convolution(bundle: Bundle) -> None:
    kept, changed = (operators(bundle, file) for file in (DIRECT, TRAIN_STEP))
    assert kept["Conv"] + kept["ConvTranspose"] == 2 + 2 + 1  # forward, gradients of weights, and of the one input
    assert changed["Conv"] + changed["ConvTranspose"] == 0


def test_both_forms_take_the_same_steps(bundle: Bundle, dataset: Dataset) -> None:
    x, y = dataset.rows(np.arange(8))
    found = []
    for form in FORMS:
        engine = open_engine(bundle, ENGINE)
        assert isinstance(engine, Portable)
        assert engine.forms == ("default", "direct")
        engine.form = form
        losses = [engine.step(x, y, learning_rate=0.05, seed=0) for _ in range(3)]
        found.append((losses, engine.read()))
    (losses, tensors), (others, other) = found
    np.testing.assert_allclose(losses, others, rtol=1e-5)
    initial = read_weights(bundle.file(WEIGHTS)).tensors
    for name, tensor in tensors.items():
        assert relative_error(other[name] - initial[name], tensor - initial[name]) < 1e-3
    assert any((tensors[name] != other[name]).any() for name in tensors)


def test_a_step_without_small_images_has_one_form(tmp_path: Path) -> None:
    made = exported(tmp_path / "one", net(nn.Flatten(), nn.Linear(32 * 36, 4), shape=IMAGE))
    assert DIRECT not in made.manifest.files
    engine = open_engine(made, ENGINE)
    assert isinstance(engine, Portable)
    assert engine.forms == ("default",)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("mlp", "the training step has a single form, as no convolution of the model has another"),
        ("cnn", "forms of the training step for train --tune: default, direct"),
    ],
)
@pytest.mark.slow
def test_export_says_what_there_is_to_choose_from(model: str, expected: str, tmp_path: Path, run: Command) -> None:
    done = run("export", model, "--engines", ENGINE, "--tunable", "-o", str(tmp_path / "bundle"))
    assert done.code == 0, done.err
    assert expected in done.out.splitlines()


def test_a_bundle_with_both_forms_trains_the_same_federation(bundle: Bundle, tmp_path: Path) -> None:
    plain = exported(tmp_path / "plain", convolutions(), tunable=False)
    assert DIRECT in bundle.manifest.files
    assert DIRECT not in plain.manifest.files
    assert plain.manifest.fingerprint == bundle.manifest.fingerprint


def test_a_wrong_direct_form_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right: Callable[..., onnx.ModelProto] = training_step._train_step

    def wrong(*args: Any, direct: bool = False) -> onnx.ModelProto:
        model = right(*args, direct=direct)
        if direct:
            (last,) = (node for node in model.graph.node if node.output[0] == "gradient")
            last.op_type, last.input[:] = "Sub", [*last.input][::-1]
        return model

    monkeypatch.setattr(training_step, "_train_step", wrong)
    with pytest.raises(FedparaError, match="gradient"):
        exported(tmp_path / "wrong", convolutions())
    assert not (tmp_path / "wrong").exists()


def test_a_recipe_without_the_engine_has_no_second_form() -> None:
    with pytest.raises(InputError, match="tunable: expected with engine onnxruntime"):
        ExportConfig(engines=("ort-training",), tunable=True)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ((10.0, 20.0, 30.0), USUAL),
        ((10.0, 5.0, 7.0), OTHER),
        ((10.0, 12.0, 4.0), THIRD),
        ((10.0, 10.001 * GAIN, 11.0), USUAL),
        ((10.0, 9.999 * GAIN, 11.0), OTHER),
    ],
)
def test_another_way_is_taken_only_if_it_is_clearly_faster(times: tuple[float, ...], expected: Way) -> None:
    ms = dict(zip((USUAL, OTHER, THIRD), times, strict=True))
    found = choose(list(ms), lambda way, _: ms[way])
    assert found == Choice(expected, ms)


def test_a_hopeless_way_is_measured_once() -> None:
    ms, measured = {USUAL: 10.0, OTHER: 4.0, THIRD: 20.0}, Counter[Way]()

    def measure(way: Way, seconds: float) -> float:
        assert (seconds == 0) == (measured[way] == 0)
        measured[way] += 1
        return ms[way]

    choose(list(ms), measure)
    assert measured == {USUAL: 3, OTHER: 3, THIRD: 1}


def test_no_turn_begins_when_the_time_is_up() -> None:
    measured = Counter[Way]()

    def measure(way: Way, _: float) -> float:
        measured[way] += 1
        return 1.0

    assert choose([USUAL, OTHER], measure, longest=0.0).way == USUAL
    assert measured == {USUAL: 1, OTHER: 1}


def test_the_shortest_of_all_times_counts() -> None:
    times = {USUAL: [10.0, 6.0, 9.0], OTHER: [8.0, 7.0, 8.0]}
    assert choose(list(times), lambda way, _: times[way].pop(0)) == Choice(USUAL, {USUAL: 6.0, OTHER: 7.0})


def opened(bundle: Bundle, dataset: Dataset, state: Path, call: TrainCall = CALL) -> tuple[Portable, list[Choice]]:
    choices: list[Choice] = []
    engine = open_tuned(bundle, call, dataset, state, seconds=0.0, on_choice=choices.append)
    assert isinstance(engine, Portable)
    return engine, choices


def test_the_choice_is_measured_once_and_kept(bundle: Bundle, dataset: Dataset, tmp_path: Path) -> None:
    engine, (choice,) = opened(bundle, dataset, tmp_path / "state")
    kept = json.loads((tmp_path / "state" / FILE).read_text(encoding="utf-8"))
    assert kept["chosen"] == {"form": choice.way.form, "threads": choice.way.threads}
    assert engine.form == choice.way.form
    assert {way.form for way in choice.milliseconds} == set(FORMS)
    again, choices = opened(bundle, dataset, tmp_path / "state")
    assert (again.form, choices) == (engine.form, [])


@pytest.mark.parametrize("chosen", ["default", "direct"])
def test_the_kept_choice_is_the_one_that_trains(bundle: Bundle, dataset: Dataset, tmp_path: Path, chosen: str) -> None:
    opened(bundle, dataset, tmp_path / "state")
    path = tmp_path / "state" / FILE
    kept = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**kept, "chosen": {"form": chosen, "threads": None}}), encoding="utf-8")
    engine, choices = opened(bundle, dataset, tmp_path / "state")
    assert (engine.form, choices) == (chosen, [])


def test_a_choice_of_other_circumstances_is_measured_anew(bundle: Bundle, dataset: Dataset, tmp_path: Path) -> None:
    opened(bundle, dataset, tmp_path / "state")
    other = TrainCall(engine=ENGINE, batch_size=2, tune=True)
    assert len(opened(bundle, dataset, tmp_path / "state", other)[1]) == 1
    assert opened(bundle, dataset, tmp_path / "state", other)[1] == []
    (tmp_path / "state" / FILE).write_text("{", encoding="utf-8")
    assert len(opened(bundle, dataset, tmp_path / "state", other)[1]) == 1


def test_a_state_folder_of_another_bundle_is_left_alone(bundle: Bundle, dataset: Dataset, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    call = {"round": 0, "base": "b" * 64}
    write_committed(state / COMMITTED, Committed(call=call, before={}, after={}), "f" * 64)
    with pytest.raises(WrongBundleError, match="give each bundle a state folder of its own"):
        opened(bundle, dataset, state)
    assert not (state / FILE).exists()


def test_a_folder_in_the_place_of_the_choice_is_refused_at_once(
    bundle: Bundle, dataset: Dataset, tmp_path: Path
) -> None:
    (tmp_path / "state" / FILE).mkdir(parents=True)
    with pytest.raises(InputError, match=r"tuning.json: expected a file or nothing, found a folder; delete it"):
        opened(bundle, dataset, tmp_path / "state")


def test_a_call_in_another_form_is_another_call(bundle: Bundle, dataset: Dataset) -> None:
    weights, found = read_weights(bundle.file(WEIGHTS)), []
    for form in FORMS:
        engine = open_engine(bundle, ENGINE)
        assert isinstance(engine, Portable)
        engine.form = form
        found.append(identity_of(weights, dataset, engine, FLOAT32, CALL, None, None))
    assert found[1] == {**found[0], "form": "direct"}


def test_threads_that_are_given_stay(bundle: Bundle, dataset: Dataset, tmp_path: Path) -> None:
    call = TrainCall(engine=ENGINE, batch_size=4, threads=1, tune=True)
    _, (choice,) = opened(bundle, dataset, tmp_path / "state", call)
    assert {*choice.milliseconds} == {Way(form, 1) for form in FORMS}


@pytest.mark.parametrize(("cores", "counts"), [(1, [None]), (2, [None, 1]), (6, [None, 1, 2, 4])])
def test_fewer_threads_than_cores_are_tried(
    bundle: Bundle,
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    counts: list[int | None],
) -> None:
    monkeypatch.setattr(tuning, "_cores", lambda: cores)
    _, (choice,) = opened(bundle, dataset, tmp_path / "state")
    assert [*choice.milliseconds] == [Way(form, count) for form in FORMS for count in counts]


@pytest.mark.slow
def test_train_tunes_and_writes_the_same_update(bundle: Bundle, dataset: Dataset, tmp_path: Path, run: Command) -> None:
    common = ["train", bundle.path, "--data", dataset.path, "--client", "ann", "--batch-size", "4"]
    for name, options in (("plain", []), ("tuned", ["--tune", "--state", tmp_path / "state"])):
        done = run(*map(str, [*common, "-o", tmp_path / name, *options]))
        assert done.code == 0, done.err
        assert done.err.startswith("tuned: ") == (name == "tuned")
    initial = read_weights(bundle.file(WEIGHTS))
    plain, tuned = (aggregate([tmp_path / name], initial).weights.tensors for name in ("plain", "tuned"))
    for name, tensor in initial.tensors.items():
        assert relative_error(tuned[name] - tensor, plain[name] - tensor) < 1e-3


def test_without_a_state_folder_there_is_no_tuning(
    bundle: Bundle, dataset: Dataset, tmp_path: Path, run: Command
) -> None:
    arguments = ["train", str(bundle.path), "--data", str(dataset.path), "-o", str(tmp_path / "u"), "--tune"]
    words = "--tune: expected a folder to keep the choice in, found none; pass --state"
    check_refused(run, tmp_path, (None, arguments, 2, words))
