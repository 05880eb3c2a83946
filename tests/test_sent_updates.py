"""An update that was sent before the device's state was committed counts as sent, at whatever step of that it died."""

import os
import sys

import pytest
from training_device import Device, go_on

from device_runtime.state import DeviceState

KILLED = 9
CALLS = ("replace", "unlink", "mkdir", "fsync", "chmod")
"""Calls of the system between any two of which the machine may die."""


@pytest.fixture
def device(device_inputs, tmp_path):
    return Device(device_inputs, tmp_path, codec="topk:share=0.2")


def train_and_die(device, after):
    """Train in a process that dies at its system call `after` since the training ended; whether it did."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED
    code, commit = 1, DeviceState.commit
    try:

        def armed(*arguments):
            left = iter(range(after))
            for name in CALLS:
                call = getattr(os, name)

                def counted(*a, call=call, **k):
                    if next(left, None) is None:
                        os._exit(KILLED)
                    return call(*a, **k)

                setattr(os, name, counted)
            commit(*arguments)

        DeviceState.commit = armed
        device.train()
        code = 0
    finally:
        os._exit(code)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_killed_between_any_two_steps_the_next_call_counts_what_was_sent(device, tmp_path):
    """The sender takes each update as soon as it is there; the next round begins as if the device had never died."""

    def next_round(after):
        one = Device(device.inputs, tmp_path / str(after), codec=device.codec)
        died = train_and_die(one, after)
        if sent := one.output.exists():
            one.output.rename(tmp_path / f"{after}.sent")
        go_on(one, tmp_path / str(after))
        one.train()
        return died, sent, one.result()

    _, _, expected = next_round(1000)
    outcomes = {True: 0, False: 0}
    for after in range(1000):
        died, sent, result = next_round(after)
        if not died:
            break
        assert (result == expected) == sent, after
        outcomes[sent] += 1
    assert outcomes[False] >= 8  # pending state, promise and update are written
    assert outcomes[True] >= 5  # the folder is synced, the state renamed, the rest removed


def test_the_same_call_writes_the_same_update_again(device):
    assert train_and_die(device, 1000) is False
    update, state = device.result()
    device.output.unlink()
    assert train_and_die(device, 12)
    device.train()
    assert device.result() == (update, state)
