"""Evaluation: the mean over all rows, whatever the size of the batches."""

import numpy as np
import pytest
from kept import commit
from softmax_regression import CLASSES, SoftmaxRegression, make_bundle, make_manifest, write_npz

from device_runtime import evaluate, load_weights, open_data
from device_runtime.engines.protocol import Outcome
from device_runtime.state import open_state
from device_runtime.statefiles import Committed
from fedpara_edge.errors import FedparaError, InputError, WrongBundleError
from fedpara_edge.formats.bundle import WEIGHTS


class Given:
    """An engine whose outputs are the inputs, and whose loss is their mean."""

    def evaluate(self, x, y):  # noqa: ARG002
        return Outcome((float(x["x"].mean(dtype=np.float64)),), {"output": x["x"]})


def evaluated(folder, manifest, x, y, batch_size=3):
    np.savez(folder / "data.npz", x=x, y=y)
    return evaluate(Given(), open_data(folder / "data.npz", manifest), batch_size)


@pytest.mark.parametrize("batch_size", [1, 4, 11, 23, 1000])
def test_batches_do_not_matter(tmp_path, batch_size):
    bundle = make_bundle(tmp_path / "bundle")
    dataset = open_data(write_npz(tmp_path / "data.npz"), bundle.manifest)
    engine = SoftmaxRegression(bundle)
    whole = engine.evaluate(dataset.arrays, dataset.arrays)
    found = evaluate(engine, dataset, batch_size)
    assert found.examples == 23
    assert found.loss == pytest.approx(whole.losses[0], rel=1e-6)
    assert found.accuracy == (whole.outputs["output"].argmax(axis=1) == dataset.arrays["y"]).mean()


def test_classes_of_sequences_lie_along_axis_1(tmp_path):
    manifest = make_manifest(x=(CLASSES, 5), y=(5,))
    x = np.random.default_rng(0).standard_normal((7, CLASSES, 5), np.float32)
    y = x.argmax(axis=1)
    y[0, :4] = (y[0, :4] + 1) % CLASSES
    assert evaluated(tmp_path, manifest, x, y).accuracy == 31 / 35


def test_binary_labels_are_right_on_the_same_side(tmp_path):
    x = np.array([[2.0], [-1.0], [0.5], [-0.5], [0.0]], np.float32)
    y = np.array([1, 0, 0, 1, 0], np.float32)
    found = evaluated(tmp_path, make_manifest(loss="bce", x=(1,)), x, y)
    assert found.accuracy == 3 / 5
    assert found.loss == pytest.approx(0.2)


def test_regression_has_no_accuracy(tmp_path):
    x = np.ones((4, 2), np.float32)
    found = evaluated(tmp_path, make_manifest(loss="mse", x=(2,), y=(2,)), x, x)
    assert found.accuracy is None
    assert found.loss == 1


def test_a_loss_that_is_not_finite_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Given, "evaluate", lambda self, x, y: Outcome((float("nan"),), x))  # noqa: ARG005
    with pytest.raises(FedparaError, match="rows 0 to 2: expected a finite loss, found nan: these weights diverged"):
        evaluated(tmp_path, make_manifest(), np.ones((4, 4), np.float32), np.zeros(4, int))


def test_batches_need_rows(tmp_path):
    with pytest.raises(InputError, match="batch_size: expected an integer of at least 1, found 0"):
        evaluated(tmp_path, make_manifest(), np.ones((4, 4), np.float32), np.zeros(4, int), batch_size=0)


def test_personal_tensors_come_from_the_state(tmp_path):
    bundle = make_bundle(tmp_path / "bundle")
    weights, state = bundle.file(WEIGHTS), tmp_path / "state"
    initial, mine = bundle.read_initial_personal()["fc.bias"], np.array([1, 2, 3], np.float32)
    with pytest.raises(InputError, match="expected a state folder, found none"):
        load_weights(SoftmaxRegression(bundle), weights, state=state)
    with open_state(state, bundle.manifest.fingerprint) as kept:
        engine = SoftmaxRegression(bundle)
        load_weights(engine, weights, state=state)
        np.testing.assert_array_equal(engine.read()["fc.bias"], initial)
        before, after = ({"personal": {"fc.bias": bias}} for bias in (initial, mine))
        commit(kept, Committed(call={"round": 0, "base": ""}, before=before, after=after))
        load_weights(engine, weights, state=state)
        np.testing.assert_array_equal(engine.read()["fc.bias"], mine)
    other = make_bundle(tmp_path / "other", seed=1)
    with pytest.raises(WrongBundleError, match="expected the state of bundle"):
        load_weights(SoftmaxRegression(other), other.file(WEIGHTS), state=state)
