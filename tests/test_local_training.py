"""Local training: however it is interrupted, the same call gives the same bytes."""

import io
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from softmax_regression import SoftmaxRegression, make_bundle, write_npz
from training_device import CONFIG, STEPS, Device, Interrupted, next_weights

from device_runtime import TrainConfig, open_data, progress_bar
from device_runtime.epochs import count_steps, step_seed, take_steps
from device_runtime.state import open_state
from fedpara_edge.errors import BusyError, FedparaError, InputError, WrongBundleError
from fedpara_edge.formats.bundle import WEIGHTS, open_bundle
from fedpara_edge.formats.update import open_update
from fedpara_edge.formats.weights import read_weights
from fedpara_edge.storage.tensorfile import TensorFile, write_tensors


def test_the_update_is_what_the_engine_learned(device_inputs, tmp_path):
    device = Device(device_inputs, tmp_path)
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
def test_a_call_interrupted_after_any_step_resumes_exactly(device_inputs, undisturbed, tmp_path, after, number):
    device = Device(device_inputs, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        device.train(engine=Interrupted(device.bundle, after=after, number=number))
    assert not device.output.exists()
    again = SoftmaxRegression(device.bundle)
    assert device.train(engine=again).resumed_from_step == after
    assert again.steps_taken == STEPS - after
    assert device.result() == undisturbed


def test_a_call_interrupted_after_every_step_resumes_exactly(device_inputs, undisturbed, tmp_path):
    device = Device(device_inputs, tmp_path)
    for _ in range(STEPS - 1):
        with pytest.raises(KeyboardInterrupt):
            device.train(engine=Interrupted(device.bundle, after=1))
    assert device.train(engine=Interrupted(device.bundle, after=1)).resumed_from_step == STEPS - 1
    assert device.result() == undisturbed


def test_an_interrupt_during_the_last_step_lets_the_call_end(device_inputs, undisturbed, tmp_path):
    device = Device(device_inputs, tmp_path)
    device.train(engine=Interrupted(device.bundle, after=STEPS))
    assert device.result() == undisturbed


def test_a_second_interrupt_stops_at_once_and_loses_only_steps(device_inputs, undisturbed, tmp_path):
    class Impatient(Interrupted):
        def step(self, *batch, **options):
            loss = super().step(*batch, **options)
            if self.steps_taken == self.after:
                signal.raise_signal(signal.SIGINT)
            return loss

    device = Device(device_inputs, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        device.train(engine=Impatient(device.bundle, after=6))
    assert device.train().resumed_from_step == 4
    assert device.result() == undisturbed


def test_signal_handlers_are_restored(device_inputs, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    device = Device(device_inputs, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        device.train(engine=Interrupted(device.bundle, after=1))
    device.train()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_training_works_outside_the_main_thread(device_inputs, undisturbed, tmp_path):
    device = Device(device_inputs, tmp_path)
    thread = threading.Thread(target=device.train)
    thread.start()
    thread.join()
    assert device.result() == undisturbed


KILLED = """
import os, signal, sys
from pathlib import Path
from training_device import Device, Interrupted
device = Device(Path(sys.argv[1]), Path(sys.argv[2]))
device.train(engine=Interrupted(device.bundle, after=10, number=signal.SIGKILL))
"""


def test_a_killed_process_resumes_from_its_last_save(device_inputs, undisturbed, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(device_inputs), str(tmp_path)],
        env={"PYTHONPATH": str(Path(__file__).parent)},
        check=False,
    )
    assert run.returncode == -signal.SIGKILL
    device = Device(device_inputs, tmp_path)
    assert device.train().resumed_from_step == 8
    assert device.result() == undisturbed


def test_a_repeated_call_repeats_its_bytes(device_inputs, undisturbed, tmp_path):
    device = Device(device_inputs, tmp_path)
    for _ in range(3):
        device.train(overwrite=True)
        assert device.result() == undisturbed


def test_a_later_round_goes_on_from_the_personal_tensors(device_inputs, undisturbed, tmp_path):
    device = Device(device_inputs, tmp_path)
    device.train()
    with open_state(device.state, device.bundle.manifest.fingerprint) as state:
        first = state.committed()
    device.weights = next_weights(device, tmp_path)
    device.train(overwrite=True)
    with open_state(device.state, device.bundle.manifest.fingerprint) as state:
        second = state.committed()
    np.testing.assert_array_equal(second.before["personal"]["fc.bias"], first.after["personal"]["fc.bias"])
    assert device.result() != undisturbed


def test_progress_of_another_call_is_dropped_with_a_message(device_inputs, undisturbed, tmp_path, capsys):
    device = Device(device_inputs, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        device.train(replace(CONFIG, seed=8, epochs=2), engine=Interrupted(device.bundle, after=3))
    device.train()
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "dropped the progress of another call (round 0, 3 steps), which differs in epochs, seed" in message
    assert device.result() == undisturbed


def test_when_to_save_does_not_belong_to_the_call(device_inputs, undisturbed, tmp_path, capsys):
    device = Device(device_inputs, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        device.train(replace(CONFIG, save_steps=None), engine=Interrupted(device.bundle, after=3))
    assert device.train(replace(CONFIG, save_seconds=0)).resumed_from_step == 3
    assert capsys.readouterr().err == ""
    assert device.result() == undisturbed


def test_existing_outputs_are_kept(device_inputs, tmp_path):
    device = Device(device_inputs, tmp_path)
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


def test_only_shared_tensors_are_in_the_update(undisturbed, tmp_path):
    (tmp_path / "update").write_bytes(undisturbed[0])
    with TensorFile(tmp_path / "update", format="fedpara-edge/update", error=InputError) as file:
        assert list(file.entries) == ["fc.weight"]


def test_arguments_that_do_not_fit_are_refused(device_inputs, tmp_path):
    device = Device(device_inputs, tmp_path)
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


def test_foreign_or_broken_weights_are_refused(device_inputs, tmp_path):
    other = make_bundle(tmp_path / "bundle", seed=1)
    device = Device(device_inputs, tmp_path / "device", weights=other.file(WEIGHTS))
    with pytest.raises(WrongBundleError, match=r"expected weights of bundle .*…, found those of .*; use weights"):
        device.train()
    device.weights = tmp_path / "nan.safetensors"
    with TensorFile(device_inputs / "bundle" / WEIGHTS, format="fedpara-edge/weights", error=InputError) as file:
        header = {key: value for key, value in file.header.items() if key != "digest"}
        broken = {name: np.full_like(file.read(name), np.nan) for name in file.entries}
    write_tensors(device.weights, broken, header)
    with pytest.raises(WrongBundleError, match=r"tensor 'fc.weight': expected finite weights, found NaN"):
        device.train()


@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide):RuntimeWarning")
def test_a_diverging_training_says_so(device_inputs, tmp_path):
    device = Device(device_inputs, tmp_path)
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


def test_clipping_and_parts_reach_the_engine_and_belong_to_the_call(device_inputs, undisturbed, tmp_path, capsys):
    device = Device(device_inputs, tmp_path)
    engine = Interrupted(device.bundle, after=3)
    with pytest.raises(KeyboardInterrupt):
        device.train(replace(CONFIG, clip_norm=0.25, micro_batches=2), engine=engine)
    adjustment, parts = engine.settings
    assert (adjustment.max_norm, adjustment.mu, adjustment.h, parts) == (0.25, 0.0, None, 2)
    device.train(replace(CONFIG, clip_norm=0.25))
    assert "which differs in parts" in capsys.readouterr().err
    assert device.result() != undisturbed


def test_dropped_rows_do_not_count_in_the_mean_loss(device_inputs, tmp_path):
    device = Device(device_inputs, tmp_path)
    config = replace(CONFIG, drop_last=True)
    result = device.train(config)
    steps = list(take_steps(SoftmaxRegression(device.bundle), device.dataset, config))
    assert result.steps == count_steps(device.dataset, config) == len(steps) == 12
    assert result.losses[0] == pytest.approx(np.mean([step.loss for step in steps[:4]]))


def test_rounds_and_seeds_draw_their_own_orders_and_masks(device_inputs):
    bundle = open_bundle(device_inputs / "bundle")
    dataset = open_data(device_inputs / "data.npz", bundle.manifest)

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
