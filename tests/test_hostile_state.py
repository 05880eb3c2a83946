"""Damaged and foreign files in a device's state folder: each is refused by name, and never blamed on the training."""

from dataclasses import replace

import numpy as np
import pytest
from softmax_regression import SoftmaxRegression
from training_device import Device, Interrupted, go_on

from device_runtime.loading import read_personal
from device_runtime.state import open_state
from device_runtime.statefiles import read_committed, read_progress, write_committed, write_progress
from fedpara_edge.errors import InputError, WrongBundleError
from fedpara_edge.storage.tensorfile import TensorFile, write_tensors


@pytest.fixture
def device(device_inputs, tmp_path):
    """A device after a first call, about to make a second one."""
    device = Device(device_inputs, tmp_path, codec="topk:share=0.2")
    device.train()
    go_on(device, tmp_path)
    return device


@pytest.fixture
def interrupted(device_inputs, tmp_path):
    """A device in the middle of its first call."""
    device = Device(device_inputs, tmp_path / "interrupted")
    with pytest.raises(KeyboardInterrupt):
        device.train(engine=Interrupted(device.bundle, after=6))
    return device


def refused(device, name, words):
    before = (device.state / name).read_bytes()
    with pytest.raises(InputError) as caught:
        device.train()
    message = str(caught.value)
    assert message.startswith(str(device.state))
    assert words in message
    assert f"delete {name} in it" in message or message.startswith(str(device.state / name))
    assert "learning rate" not in message
    assert message.isprintable()
    assert (device.state / name).read_bytes() == before
    assert not device.output.exists()


def rewrite(path, *, tensors=None, **changed):
    """Change header fields (None removes one) or all tensors, as an older release would have written them."""
    with TensorFile(path, format=None, error=InputError) as file:
        header = {**file.header, "digest": None, **changed}
        kept = {name: file.read(name) for name in file.entries}
    write_tensors(path, kept if tensors is None else tensors(kept), {k: v for k, v in header.items() if v is not None})


ODD = [None, True, -1, 1.5, 10**400, "x", [], {}, [[]], {"round": "3"}, {"round": 3, "base": 4}]


@pytest.mark.parametrize("value", ODD, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("field", ["call", "fingerprint"])
def test_fields_of_a_committed_state(device, field, value):
    rewrite(device.state / "lasting.safetensors", **{field: value})
    with pytest.raises((InputError, WrongBundleError), match=r"lasting\.safetensors: expected|: call: expected"):
        device.train()


POSSIBLE = {"output": "x", "seconds": 1.5, "loss_sums": []}


@pytest.mark.parametrize(
    ("field", "value"),
    [(f, v) for f in ("call", "output", "step", "seconds", "loss_sums") for v in ODD if POSSIBLE.get(f) != v],
    ids=lambda value: str(value)[:20],
)
def test_fields_of_a_progress(interrupted, field, value):
    rewrite(interrupted.state / "progress.safetensors", **{field: value})
    refused(interrupted, "progress.safetensors", f"{field}: expected that of a fedpara-edge/progress, found ")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"step": 16, "loss_sums": (1.0,) * 4}, "at most 15 steps"),
        ({"loss_sums": ()}, "a sum of losses for each epoch"),
        ({"groups": {}}, "tensors of engine softmax-regression"),
        ({"groups": {"engine": {"fc.weight": np.zeros(3)}}}, "tensors of engine softmax-regression"),
    ],
)
def test_a_progress_that_does_not_fit_the_call(interrupted, changed, words):
    path, fingerprint = interrupted.state / "progress.safetensors", interrupted.bundle.manifest.fingerprint
    write_progress(path, replace(read_progress(path, fingerprint), **changed), fingerprint)
    refused(interrupted, "progress.safetensors", words)


GROUPS = {
    "a personal tensor is missing": lambda groups: {**groups, "personal": {}},
    "no personal tensors": lambda groups: {"residual": groups["residual"]},
    "a tensor too many": lambda groups: {**groups, "personal": {**groups["personal"], "x": np.zeros(1, np.float32)}},
    "another shape": lambda groups: {**groups, "residual": {n: t[..., None] for n, t in groups["residual"].items()}},
    "another dtype": lambda groups: {**groups, "residual": {n: np.float64(t) for n, t in groups["residual"].items()}},
    "an unknown group": lambda groups: {**groups, "": groups["residual"], "odd": {"x": np.zeros(1, np.float32)}},
}


@pytest.mark.parametrize("case", GROUPS)
def test_groups_that_are_not_those_of_the_bundle(device, case):
    path, fingerprint = device.state / "lasting.safetensors", device.bundle.manifest.fingerprint
    committed = read_committed(path, fingerprint)
    write_committed(path, replace(committed, after=GROUPS[case](committed.after)), fingerprint)
    refused(device, "lasting.safetensors", ": expected ")
    with pytest.raises(InputError, match="expected "):
        read_personal(device.bundle, device.state)


def test_personal_tensors_are_those_that_were_trained(device):
    committed = read_committed(device.state / "lasting.safetensors", device.bundle.manifest.fingerprint)
    found = read_personal(device.bundle, device.state)
    assert found.keys() == committed.after["personal"].keys() != set()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor, committed.after["personal"][name])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("group", ["before/personal", "after/residual"])
def test_a_value_that_is_not_finite(device, group, value):
    def poison(kept):
        return {name: np.full_like(t, value) if name.startswith(group) else t for name, t in kept.items()}

    rewrite(device.state / "lasting.safetensors", tensors=poison)
    refused(device, "lasting.safetensors", f"tensor '{group}/fc.")


def test_files_without_a_digest_are_read(device, interrupted):
    rewrite(device.state / "lasting.safetensors")
    device.train()
    rewrite(interrupted.state / "progress.safetensors")
    assert interrupted.train(engine=SoftmaxRegression(interrupted.bundle)).resumed_from_step == 6


@pytest.mark.parametrize(
    "promise", [b"", b"\xff", b"[" * 100_000, b"[]", b'{"output": 3, "waiting": "x"}', b'{"output": "/x"}']
)
def test_a_damaged_promise(device, promise):
    (device.state / "pending.json").write_bytes(promise)
    with pytest.raises(InputError, match=r"pending\.json: expected the place of an update, found a damaged file; del"):
        device.train()
    (device.state / "pending.json").unlink()
    device.train()


def test_a_promise_reaches_nothing_but_leftovers(device, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").write_text("")
    (device.state / "pending.json").write_text(f'{{"output": "{tmp_path}/mine", "waiting": "../../other"}}')
    with open_state(device.state, device.bundle.manifest.fingerprint):
        assert (tmp_path / "other" / "mine").exists()
        assert not (device.state / "pending.json").exists()
