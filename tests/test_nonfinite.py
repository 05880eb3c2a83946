"""A loss that is not finite: what is said of its cause holds, and the learning rate is blamed only where it may be."""

import numpy as np
import pytest
from softmax_regression import FEATURES, SoftmaxRegression, make_bundle

from device_runtime import evaluate, open_data, train
from device_runtime.config import TrainConfig
from device_runtime.engines.ort import remedy_for
from fedpara_edge.errors import DivergedError
from fedpara_edge.formats.bundle import WEIGHTS

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide):RuntimeWarning")
ROWS = 40


class Padded(SoftmaxRegression):
    """A model that divides by what is in a row: one of zeros is 0 / 0."""

    def evaluate(self, x, y):
        x, y = self.arrays(x, y)
        return super().evaluate(x / np.abs(x).sum(axis=1, keepdims=True), y)


class WholeBatches(Padded):
    """One that can't be evaluated on fewer than two rows."""

    def evaluate(self, x, y):
        if len(self.arrays(x, y)[1]) == 1:
            raise DivergedError("one row")
        return super().evaluate(x, y)


def failure(tmp_path, zeros, kind=Padded, **options):
    """The message of a training on rows some of which are zeros."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((ROWS, FEATURES), np.float32)
    x[list(zeros)] = 0
    np.savez(tmp_path / "data.npz", x=x, y=generator.integers(0, 3, ROWS))
    bundle = make_bundle(tmp_path / "bundle", personal=False)
    dataset = open_data(tmp_path / "data.npz", bundle.manifest)
    config = TrainConfig(**{"lr": 0.1, "batch_size": ROWS, "seed": 1, **options})
    with pytest.raises(DivergedError) as caught:
        train(kind(bundle), dataset, bundle.file(WEIGHTS), config, output=tmp_path / "update.safetensors")
    return str(caught.value)


def test_a_row_that_gives_it_alone_is_named(tmp_path):
    message = failure(tmp_path, [17])
    assert message.startswith(f"step 1 of 1: expected a finite loss, found nan: {tmp_path / 'data.npz'}: row 17 gives")
    assert "learning rate" not in message


def test_a_row_is_named_in_whichever_step_it_comes(tmp_path):
    message = failure(tmp_path, [3, 29], batch_size=4)
    found = [row for row in (3, 29) if str(row) in message.partition("data.npz")[2]]
    assert found
    assert "learning rate" not in message


@pytest.mark.parametrize(("zeros", "kind"), [(range(ROWS), Padded), (range(5), Padded), ([3], WholeBatches)])
def test_before_any_step_the_learning_rate_is_not_at_fault(tmp_path, zeros, kind):
    message = failure(tmp_path, zeros, kind)
    assert "no step was taken before, so the learning rate is not at fault" in message
    assert "row " not in message.partition("data.npz")[2]


def test_a_rate_that_is_too_large_is_blamed(tmp_path):
    message = failure(tmp_path, [], SoftmaxRegression, lr=1e38, epochs=20)
    assert not message.startswith("step 1 of")
    assert "the training diverged; lower the learning rate (1e+38)" in message


def test_an_evaluation_names_the_row(tmp_path):
    x = np.ones((9, FEATURES), np.float32)
    x[7] = 0
    np.savez(tmp_path / "data.npz", x=x, y=np.zeros(9, int))
    bundle = make_bundle(tmp_path / "bundle")
    dataset = open_data(tmp_path / "data.npz", bundle.manifest)
    with pytest.raises(
        DivergedError, match=r"rows 4 to 7: expected a finite loss, found nan: .*: row 7 gives it alone"
    ):
        evaluate(Padded(bundle), dataset, batch_size=4)


def test_a_smaller_batch_is_advised_for_lack_of_memory_alone():
    assert remedy_for(RuntimeError("Failed to allocate memory for requested buffer of size 9"), 7).startswith("reduce")
    assert "leave batches of 1 out" in remedy_for(RuntimeError("Gemm: dimension mismatch"), 1)
