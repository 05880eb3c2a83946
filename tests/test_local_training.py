"""Local training: however it is interrupted, the same call gives the same bytes."""

import io
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from failing_disk import PowerCutError
from softmax_regression import SoftmaxRegression, make_bundle, write_npz

from device_runtime import TrainConfig, open_data, progress_bar, train
from device_runtime.epochs import count_steps, step_seed, take_steps
from device_runtime.state import open_state
from fedpara_edge.codecs import find_encoder
from fedpara_edge.errors import BusyError, FedparaError, InputError, WrongBundleError
from fedpara_edge.formats.bundle import WEIGHTS, open_bundle
from fedpara_edge.formats.update import open_update
from fedpara_edge.formats.weights import read_weights, write_weights
from fedpara_edge.storage.tensorfile import TensorFile, write_tensors

CONFIG = TrainConfig(epochs=3, batch_size=5, lr=0.2, seed=7, schedule="cosine", save_steps=4)
STEPS = 15  # 23 examples in batches of 5, 3 epochs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a bundle and data."""
    folder = tmp_path_factory.mktemp("inputs")
    make_bundle(folder / "bundle")
    write_npz(folder / "data.npz")
    return folder


class Device:
    """A device with its own folder, that makes the same call again and again."""

    def __init__(self, inputs, folder, *, weights=None, codec="float32"):
        folder.mkdir(exist_ok=True)
        self.inputs = inputs
        self.bundle = open_bundle(inputs / "bundle")
        self.dataset = open_data(inputs / "data.npz", self.bundle.manifest)
        self.weights = weights or self.bundle.file(WEIGHTS)
        self.codec = codec
        self.output, self.state = folder / "update.safetensors", folder / "state"
        if not self.state.exists():
            self.state.mkdir()
            (self.state / "client").write_text("tester\n")

    def train(self, config=CONFIG, *, engine=None, state=True, **options):
        """Call `train` with a new engine."""
        return train(
            engine or SoftmaxRegression(self.bundle),
            self.dataset,
            self.weights,
            config,
            output=self.output,
            state=self.state if state else None,
            encoder=find_encoder(self.codec),
            **options,
        )

    def result(self):
        """All bytes that a finished call leaves behind."""
        assert {file.name for file in self.state.iterdir()} == {"lock", "client", "lasting.safetensors"}
        return self.output.read_bytes(), (self.state / "lasting.safetensors").read_bytes()


@pytest.fixture(scope="module")
def expected(inputs, tmp_path_factory):
    """The bytes of the call without any interruption."""
    device = Device(inputs, tmp_path_factory.mktemp("device"))
    device.train()
    return device.result()


class Interrupted(SoftmaxRegression):
    """An engine during whose steps, once `after` of them were taken, a signal arrives."""

    def __init__(self, bundle, *, after, number=signal.SIGINT):
        super().__init__(bundle)
        self.after, self.number = after, number

    def step(self, *batch, **options):
        loss = super().step(*batch, **options)
        if self.steps_taken == self.after:
            signal.raise_signal(self.number)
        return loss


def test_the_update_is_what_the_engine_learned(inputs, tmp_path):
    device = Device(inputs, tmp_path)
    result = device.train()
    engine = SoftmaxRegression(device.bundle)
    steps = list(take_steps(engine, device.dataset, CONFIG))
    base = read_weights(device.weights)
    update = open_update(device.output, base)
    change = np.empty(12, np.float32)
    update.decoder.decode(0, change)
    update.close()
    trained = engine.read()
    np.testing.assert_array_equal(change, (trained["fc.weight"] - base.tensors["fc.weight"]).ravel())
    with open_state(device.state, base.fingerprint) as state:
        committed = state.committed()
    np.testing.assert_array_equal(committed.after["personal"]["fc.bias"], trained["fc.bias"])
    np.testing.assert_array_equal(
        committed.before["personal"]["fc.bias"], device.bundle.read_initial_personal()["fc.bias"]
    )

    losses = tuple(sum(step.loss * step.examples for step in steps if step.epoch == epoch) / 23 for epoch in range(3))
    assert result.losses == losses
    assert losses[2] < losses[0]
    assert update.header.metrics == pytest.approx({"loss": losses[2], "first_epoch_loss": losses[0]}, rel=5e-6)
    assert all(len(str(loss)) <= 8 for loss in update.header.metrics.values())
    assert (update.header.client, update.header.examples, update.header.steps) == ("tester", 23, STEPS)
    assert (result.steps, result.resumed_from_step, result.round, result.client) == (STEPS, 0, 0, "tester")
    assert result.update_bytes == device.output.stat().st_size
    assert result.seconds > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after", range(1, STEPS))
def test_a_call_interrupted_after_any_step_resumes_exactly(inputs, expected, tmp_path, after, number):
    device = Device(inputs, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        device.train(engine=Interrupted(device.bundle, after=after, number=number))
    assert not device.output.exists()
    again = SoftmaxRegression(device.bundle)
    assert device.train(engine=again).resumed_from_step == after
    assert again.steps_taken == STEPS - after
    assert device.result() == expected


def test_a_call_interrupted_after_every_step_resumes_exactly(inputs, expected, tmp_path):
    device = Device(inputs, tmp_path)
    for _ in range(STEPS - 1):
        with pytest.raises(KeyboardInterrupt):
            device.train(engine=Interrupted(device.bundle, after=1))
    assert device.train(engine=Interrupted(device.bundle, after=1)).resumed_from_step == STEPS - 1
    assert device.result() == expected


def test_an_interrupt_during_the_last_step_lets_the_call_end(inputs, expected, tmp_path):
    device = Device(inputs, tmp_path)
    device.train(engine=Interrupted(device.bundle, after=STEPS))
    assert device.result() == expected


def test_a_second_interrupt_stops_at_once_and_loses_only_steps(inputs, expected, tmp_path):
    class Impatient(Interrupted):
        def step(self, *batch, **options):
            loss = super().step(*batch, **options)
            if self.steps_taken == self.after:
                signal.raise_signal(signal.SIGINT)
            return loss

    device = Device(inputs, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        device.train(engine=Impatient(device.bundle, after=6))
    assert device.train().resumed_from_step == 4
    assert device.result() == expected


def test_signal_handlers_are_restored(inputs, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    device = Device(inputs, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        device.train(engine=Interrupted(device.bundle, after=1))
    device.train()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_training_works_outside_the_main_thread(inputs, expected, tmp_path):
    device = Device(inputs, tmp_path)
    thread = threading.Thread(target=device.train)
    thread.start()
    thread.join()
    assert device.result() == expected


CHANGES, LAST_SAVE = 18, 7
"""Renames and removals of a call, and those up to the rename of its last progress."""


class PowerCut:
    """Lets `allowed` renames and removals happen, then none: a cut before the next or, with `late`, right after it."""

    def __init__(self, monkeypatch, allowed, *, late):
        self.left, self.late = allowed, late
        for name in ("replace", "unlink"):
            monkeypatch.setattr(Path, name, self.guarded(getattr(Path, name)))
        remove = shutil.rmtree  # of temporary folders, which stay where the power is gone
        monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: None if self.happened else remove(*a, **k))

    def guarded(self, change):
        def guarded(path, *arguments, **options):
            if self.left == 0 and self.late:
                self.late = False
                change(path, *arguments, **options)
            if self.left <= 0:
                self.left = -1
                raise PowerCutError
            self.left -= 1
            return change(path, *arguments, **options)

        return guarded

    @property
    def happened(self):
        return self.left < 0


def train_until_power_cut(device, allowed, *, late):
    """Whether the call ended before the cut."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        power = PowerCut(monkeypatch, allowed, late=late)
        try:
            device.train()
        except PowerCutError:
            assert power.happened
            return False
        except InputError as error:
            # Cut after the very last commit: the call had ended, and says so.
            assert "found an existing one" in str(error)  # noqa: PT017
        return True


def complete(device):
    while not train_until_power_cut(device, 1000, late=False):
        pass
    return device.result()


@pytest.mark.parametrize("late", [False, True])
def test_a_power_cut_at_any_write_changes_nothing(inputs, expected, tmp_path, late):
    for first in range(100):
        device = Device(inputs, tmp_path / f"{first}")
        if train_until_power_cut(device, first, late=late):
            break
        assert complete(device) == expected
    # Three saves of the progress and the last one, the pending state in two files and the update, each renamed and its
    # lock removed; the committed state, and three removals.
    assert first == CHANGES


@pytest.mark.parametrize("allowed", range(LAST_SAVE, CHANGES))
def test_a_power_cut_after_the_last_save_costs_no_step(inputs, expected, tmp_path, allowed):
    device = Device(inputs, tmp_path)
    assert not train_until_power_cut(device, allowed, late=False)
    engine = SoftmaxRegression(device.bundle)
    assert device.train(engine=engine).resumed_from_step == STEPS
    assert engine.steps_taken == 0
    assert device.result() == expected


@pytest.mark.parametrize("late", [False, True])
def test_so_do_two_power_cuts(inputs, expected, tmp_path, late):
    for first in range(CHANGES):
        for second in range(100):
            device = Device(inputs, tmp_path / f"{first}-{second}")
            assert not train_until_power_cut(device, first, late=late)
            if train_until_power_cut(device, second, late=not late):
                break
            assert complete(device) == expected


@pytest.mark.parametrize("codec", ["float32", "topk:share=0.2", "uniform"])
def test_a_power_cut_at_any_write_of_a_later_call_changes_nothing(inputs, tmp_path, codec):
    def second_call(folder):
        device = Device(inputs, folder, codec=codec)
        device.train()
        go_on(device, folder)
        return device

    reference = second_call(tmp_path / "reference")
    reference.train()
    with open_state(reference.state, reference.bundle.manifest.fingerprint) as state:
        assert ("residual" in state.committed().after) == (codec != "float32")
    for first in range(11):
        device = second_call(tmp_path / f"{first}")
        assert not train_until_power_cut(device, first, late=False)
        assert complete(device) == reference.result()


@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_what_an_update_that_was_in_place_left_out_is_never_lost(inputs, tmp_path, late, taken):
    """The server may have the update, above all if it was taken away: the next call must begin with its residual."""

    def call_after(folder, allowed):
        device = Device(inputs, folder, codec="topk:share=0.2")
        ended = train_until_power_cut(device, allowed, late=late)
        sent = device.output.exists()
        if taken:
            device.output.unlink(missing_ok=True)
        go_on(device, folder)
        device.train()
        return ended, sent, device.result()

    *_, expected = call_after(tmp_path / "reference", 1000)
    cuts = []
    for allowed in range(100):
        ended, sent, result = call_after(tmp_path / f"{allowed}", allowed)
        if ended:
            break
        assert (result == expected) == sent
        cuts.append(sent)
    assert cuts.count(True) >= 4
    assert cuts.count(False) >= 4


def go_on(device, folder):
    """To the next round."""
    device.output = folder / "second.safetensors"
    device.weights = next_weights(device, folder)


def next_weights(device, folder):
    """The weights of the next round."""
    base = read_weights(device.weights)
    path = folder / "next.safetensors"
    write_weights(path, replace(base, round=base.round + 1, tensors={k: v + 0.25 for k, v in base.tensors.items()}))
    return path


KILLED = """
import os, signal, sys
from pathlib import Path
from test_local_training import Device, Interrupted
device = Device(Path(sys.argv[1]), Path(sys.argv[2]))
device.train(engine=Interrupted(device.bundle, after=10, number=signal.SIGKILL))
"""


def test_a_killed_process_resumes_from_its_last_save(inputs, expected, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(inputs), str(tmp_path)],
        env={"PYTHONPATH": str(Path(__file__).parent)},
        check=False,
    )
    assert run.returncode == -signal.SIGKILL
    device = Device(inputs, tmp_path)
    assert device.train().resumed_from_step == 8
    assert device.result() == expected


def test_a_repeated_call_repeats_its_bytes(inputs, expected, tmp_path):
    device = Device(inputs, tmp_path)
    for _ in range(3):
        device.train(overwrite=True)
        assert device.result() == expected


def test_a_later_round_goes_on_from_the_personal_tensors(inputs, expected, tmp_path):
    device = Device(inputs, tmp_path)
    device.train()
    with open_state(device.state, device.bundle.manifest.fingerprint) as state:
        first = state.committed()
    device.weights = next_weights(device, tmp_path)
    device.train(overwrite=True)
    with open_state(device.state, device.bundle.manifest.fingerprint) as state:
        second = state.committed()
    np.testing.assert_array_equal(second.before["personal"]["fc.bias"], first.after["personal"]["fc.bias"])
    assert device.result() != expected


def test_progress_of_another_call_is_dropped_with_a_message(inputs, expected, tmp_path, capsys):
    device = Device(inputs, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        device.train(replace(CONFIG, seed=8, epochs=2), engine=Interrupted(device.bundle, after=3))
    device.train()
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "dropped the progress of another call (round 0, 3 steps), which differs in epochs, seed" in message
    assert device.result() == expected


def test_when_to_save_does_not_belong_to_the_call(inputs, expected, tmp_path, capsys):
    device = Device(inputs, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        device.train(replace(CONFIG, save_steps=None), engine=Interrupted(device.bundle, after=3))
    assert device.train(replace(CONFIG, save_seconds=0)).resumed_from_step == 3
    assert capsys.readouterr().err == ""
    assert device.result() == expected


def test_existing_outputs_are_kept(inputs, tmp_path):
    device = Device(inputs, tmp_path)
    device.output.write_text("mine")
    with pytest.raises(InputError, match="choose another name or pass --overwrite"):
        device.train()
    assert device.output.read_text() == "mine"
    device.train(overwrite=True)
    assert device.output.read_bytes() != b"mine"


def test_without_a_state_folder(tmp_path):
    make_bundle(tmp_path / "bundle", personal=False)
    write_npz(tmp_path / "data.npz")
    plain, kept = Device(tmp_path, tmp_path / "plain"), Device(tmp_path, tmp_path / "kept")
    plain.train(state=False, client="tester")
    kept.train()
    assert plain.output.read_bytes() == kept.output.read_bytes()
    names = {plain.train(state=False, overwrite=True).client for _ in range(3)}
    assert len(names) == 3
    with pytest.raises(KeyboardInterrupt):
        plain.train(state=False, engine=Interrupted(plain.bundle, after=3), overwrite=True)


def test_only_shared_tensors_are_in_the_update(expected, tmp_path):
    (tmp_path / "update").write_bytes(expected[0])
    with TensorFile(tmp_path / "update", format="fedpara-edge/update", error=InputError) as file:
        assert list(file.entries) == ["fc.weight"]


def test_arguments_that_do_not_fit_are_refused(inputs, tmp_path):
    device = Device(inputs, tmp_path)
    with pytest.raises(InputError, match=r"a folder for its personal tensors \(1\), found none; pass --state"):
        device.train(state=False)
    with pytest.raises(InputError, match="client: expected 1 to 200 printable characters"):
        device.train(client="")
    with pytest.raises(InputError, match="warmup_steps: expected fewer than the 15 steps of this call, found 15"):
        device.train(replace(CONFIG, warmup_steps=15))
    with pytest.raises(InputError, match="drop_last: expected at least one whole batch of 24 rows"):
        device.train(replace(CONFIG, batch_size=24, drop_last=True))
    with open_state(device.state, ""), pytest.raises(BusyError, match="in use"):
        device.train()
    assert not device.output.exists()


def test_foreign_or_broken_weights_are_refused(inputs, tmp_path):
    other = make_bundle(tmp_path / "bundle", seed=1)
    device = Device(inputs, tmp_path / "device", weights=other.file(WEIGHTS))
    with pytest.raises(WrongBundleError, match=r"expected weights of bundle .*…, found those of .*; use weights"):
        device.train()
    device.weights = tmp_path / "nan.safetensors"
    with TensorFile(inputs / "bundle" / WEIGHTS, format="fedpara-edge/weights", error=InputError) as file:
        header = {key: value for key, value in file.header.items() if key != "digest"}
        broken = {name: np.full_like(file.read(name), np.nan) for name in file.entries}
    write_tensors(device.weights, broken, header)
    with pytest.raises(WrongBundleError, match=r"tensor 'fc.weight': expected finite weights, found NaN"):
        device.train()


@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide):RuntimeWarning")
def test_a_diverging_training_says_so(inputs, tmp_path):
    device = Device(inputs, tmp_path)
    with pytest.raises(FedparaError, match=r"step \d+ of 15: expected a finite loss, found .*lower the learning rate"):
        device.train(replace(CONFIG, lr=1e38))
    with pytest.raises(FedparaError, match=r"tensor 'fc.\w+': expected finite values after the last step"):
        device.train(replace(CONFIG, lr=1e39, epochs=1, batch_size=23))
    assert not device.output.exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("epochs", True),
        ("batch_size", 0),
        ("batch_size", 1.0),
        ("seed", -1),
        ("seed", 1 << 32),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("clip_norm", 0.0),
        ("clip_norm", float("inf")),
        ("micro_batches", 0),
        ("micro_batches", 2.0),
        ("save_seconds", -1),
        ("save_steps", 0),
    ],
)
def test_config_out_of_range_is_refused(field, value):
    with pytest.raises(InputError, match=f"{field}: expected"):
        TrainConfig(**{field: value})


def test_clipping_and_parts_reach_the_engine_and_belong_to_the_call(inputs, expected, tmp_path, capsys):
    device = Device(inputs, tmp_path)
    engine = Interrupted(device.bundle, after=3)
    with pytest.raises(KeyboardInterrupt):
        device.train(replace(CONFIG, clip_norm=0.25, micro_batches=2), engine=engine)
    adjustment, parts = engine.settings
    assert (adjustment.max_norm, adjustment.mu, adjustment.h, parts) == (0.25, 0.0, None, 2)
    device.train(replace(CONFIG, clip_norm=0.25))
    assert "which differs in parts" in capsys.readouterr().err
    assert device.result() != expected


def test_dropped_rows_do_not_count_in_the_mean_loss(inputs, tmp_path):
    device = Device(inputs, tmp_path)
    config = replace(CONFIG, drop_last=True)
    result = device.train(config)
    steps = list(take_steps(SoftmaxRegression(device.bundle), device.dataset, config))
    assert result.steps == count_steps(device.dataset, config) == len(steps) == 12
    assert result.losses[0] == pytest.approx(np.mean([step.loss for step in steps[:4]]))


def test_rounds_and_seeds_draw_their_own_orders_and_masks(inputs):
    bundle = open_bundle(inputs / "bundle")
    dataset = open_data(inputs / "data.npz", bundle.manifest)

    class Recorder(SoftmaxRegression):
        def step(self, x, y, *, seed, **settings):
            seen.append((x["x"].tobytes(), seed))
            return super().step(x, y, seed=seed, **settings)

    seen = []
    for seed in range(3):
        for round in range(3):
            list(take_steps(Recorder(bundle), dataset, replace(CONFIG, seed=seed), round=round))
    assert len({x for x, _ in seen}) == len({seed for _, seed in seen}) == len(seen) == 9 * STEPS
    assert all(0 <= step_seed(seed, step) < 1 << 31 for seed in (0, (1 << 32) - 1) for step in (0, 1 << 40))


def test_the_bar_is_drawn_on_terminals_only():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    with progress_bar(io.StringIO()) as on_step:
        assert on_step is None
    screen = Terminal()
    with progress_bar(screen) as on_step:
        for step in range(1, 31):
            on_step(step, 30, 0.125)
    assert screen.getvalue().startswith("\r\x1b[K[#.")
    last = screen.getvalue().rpartition("\r")[2]
    assert last.startswith(f"\x1b[K[{'#' * 30}] 30/30 steps, loss 0.125, ")
    assert last.endswith(" steps/s\n")
