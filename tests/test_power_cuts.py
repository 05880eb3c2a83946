"""Local training whose power is cut at any write: the same call gives the same bytes."""

import shutil
from pathlib import Path

import pytest
from failing_disk import PowerCutError
from softmax_regression import SoftmaxRegression
from training_device import STEPS, Device, go_on

from device_runtime.state import open_state
from fedpara_edge.errors import InputError

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
def test_a_power_cut_at_any_write_changes_nothing(device_inputs, undisturbed, tmp_path, late):
    for first in range(100):
        device = Device(device_inputs, tmp_path / f"{first}")
        if train_until_power_cut(device, first, late=late):
            break
        assert complete(device) == undisturbed
    # Three saves of the progress and the last one, the pending state in two files and the update, each renamed and its
    # lock removed; the committed state, and three removals.
    assert first == CHANGES


@pytest.mark.parametrize("allowed", range(LAST_SAVE, CHANGES))
def test_a_power_cut_after_the_last_save_costs_no_step(device_inputs, undisturbed, tmp_path, allowed):
    device = Device(device_inputs, tmp_path)
    assert not train_until_power_cut(device, allowed, late=False)
    engine = SoftmaxRegression(device.bundle)
    assert device.train(engine=engine).resumed_from_step == STEPS
    assert engine.steps_taken == 0
    assert device.result() == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True])
def test_so_do_two_power_cuts(device_inputs, undisturbed, tmp_path, late):
    for first in range(CHANGES):
        for second in range(100):
            device = Device(device_inputs, tmp_path / f"{first}-{second}")
            assert not train_until_power_cut(device, first, late=late)
            if train_until_power_cut(device, second, late=not late):
                break
            assert complete(device) == undisturbed


@pytest.mark.parametrize("codec", ["float32", "topk:share=0.2", "uniform"])
def test_a_power_cut_at_any_write_of_a_later_call_changes_nothing(device_inputs, tmp_path, codec):
    def second_call(folder):
        device = Device(device_inputs, folder, codec=codec)
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
def test_what_an_update_that_was_in_place_left_out_is_never_lost(device_inputs, tmp_path, late, taken):
    """The server may have the update, above all if it was taken away: the next call must begin with its residual."""

    def call_after(folder, allowed):
        device = Device(device_inputs, folder, codec="topk:share=0.2")
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
