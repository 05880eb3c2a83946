"""Error feedback on a device: over many rounds nothing that was learned is lost, whatever happens to the device."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_round
from failing_disk import PowerCutError
from norms import norm
from softmax_regression import CutShort, SoftmaxRegression, make_bundle, write_npz

from device_runtime import TrainConfig, open_data, train
from device_runtime.epochs import take_steps
from device_runtime.state import open_state
from fedpara_edge.codecs import find_encoder
from fedpara_edge.formats.bundle import Bundle, open_bundle
from fedpara_edge.formats.update import open_update
from fedpara_edge.formats.weights import Weights, read_weights, write_weights

CONFIG = TrainConfig(epochs=2, batch_size=5, lr=0.2, seed=7, save_steps=3)
ROUNDS = 8
CODECS = ["int2:block=16", "rotated:bits=2,block=16", "uniform:step=3", "topk:share=0.1", "adaptive:bytes=20"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("inputs")
    make_bundle(folder / "bundle", personal=False)
    write_npz(folder / "data.npz")
    return open_bundle(folder / "bundle")


class Rounds:
    """A device that trains round after round, each from the weights that its own last update made."""

    def __init__(self, bundle: Bundle, folder: Path, codec: str) -> None:
        folder.mkdir()
        self.bundle, self.folder, self.codec = bundle, folder, codec
        self.dataset = open_data(bundle.path.parent / "data.npz", bundle.manifest)
        self.weights = read_weights(bundle.path / "weights.safetensors")
        self.sent = {name: np.zeros(tensor.shape) for name, tensor in self.weights.tensors.items()}
        self.learned = {name: np.zeros(tensor.shape) for name, tensor in self.weights.tensors.items()}

    def call(self, engine: SoftmaxRegression | None = None) -> Path:
        base, output = self.folder / f"weights-{self.weights.round}", self.folder / f"update-{self.weights.round}"
        if not base.exists():
            write_weights(base, self.weights)
        train(
            engine or SoftmaxRegression(self.bundle),
            self.dataset,
            base,
            CONFIG,
            output=output,
            state=self.folder / "state",
            client="tester",
            encoder=find_encoder(self.codec),
            overwrite=True,
        )
        return output

    def next_round(self, prepare: Callable[["Rounds"], None] = lambda _: None) -> bytes:
        """One round, after whatever `prepare` does; return the update."""
        prepare(self)
        path = self.call()
        engine = SoftmaxRegression(self.bundle)
        engine.load(self.weights.tensors)
        list(take_steps(engine, self.dataset, CONFIG, round=self.weights.round))
        update = open_update(path, self.weights)
        flat = np.empty(sum(tensor.size for tensor in self.weights.tensors.values()), np.float32)
        update.decoder.decode(0, flat)
        update.close()
        tensors, start = {}, 0
        for name in sorted(self.weights.tensors):
            base = self.weights.tensors[name]
            decoded = flat[start : start + base.size].reshape(base.shape)
            start += base.size
            self.sent[name] += decoded
            self.learned[name] += engine.read()[name] - base
            tensors[name] = base + decoded
        self.weights = Weights(self.weights.fingerprint, self.weights.round + 1, self.weights.layout, tensors)
        return path.read_bytes()

    def residual(self) -> dict[str, np.ndarray]:
        with open_state(self.folder / "state", self.weights.fingerprint) as state:
            committed = state.committed()
        assert committed is not None
        return dict(committed.after["residual"])


@pytest.mark.parametrize("codec", CODECS)
def test_what_was_sent_and_what_is_left_are_what_was_learned(bundle: Bundle, tmp_path: Path, codec: str) -> None:
    device = Rounds(bundle, tmp_path / "device", codec)
    for _ in range(ROUNDS):
        device.next_round()
    residual = device.residual()
    for name, learned in device.learned.items():
        # Each round rounds twice, to float32: the change plus the residual, and what is left of that.
        tolerance = 2.0**-24 * 2 * ROUNDS * max(np.abs(learned).max(), np.abs(residual[name]).max())
        np.testing.assert_allclose(device.sent[name] + residual[name], learned, rtol=0, atol=tolerance)
        assert np.abs(residual[name]).max() > 100 * tolerance  # else it would be a lossless codec that passes
    assert norm(small_round.flat(device.sent)) > 0.3 * norm(small_round.flat(device.learned))


def cut_power_then_repeat(device: Rounds) -> None:
    for after in (1, 4, 2):
        with pytest.raises(PowerCutError):
            device.call(CutShort(device.bundle, after))


def finish_twice(device: Rounds) -> None:
    device.call()


@pytest.mark.parametrize("prepare", [cut_power_then_repeat, finish_twice])
@pytest.mark.parametrize("codec", ["uniform:step=3", "topk:share=0.1"])
def test_the_residual_counts_once_however_often_the_device_dies(
    bundle: Bundle, tmp_path: Path, codec: str, prepare: Callable[[Rounds], None]
) -> None:
    undisturbed = Rounds(bundle, tmp_path / "undisturbed", codec)
    disturbed = Rounds(bundle, tmp_path / "disturbed", codec)
    for _ in range(4):
        assert disturbed.next_round(prepare) == undisturbed.next_round()
    for name, tensor in undisturbed.residual().items():
        np.testing.assert_array_equal(disturbed.residual()[name], tensor)


def test_without_a_state_folder_rounding_is_random_and_of_every_client_another(bundle: Bundle, tmp_path: Path) -> None:
    dataset = open_data(bundle.path.parent / "data.npz", bundle.manifest)
    weights = bundle.path / "weights.safetensors"

    def update(client: str, seed: int) -> bytes:
        output = tmp_path / "update"
        config = replace(CONFIG, seed=seed)
        engine = SoftmaxRegression(bundle)
        train(
            engine,
            dataset,
            weights,
            config,
            output=output,
            client=client,
            encoder=find_encoder("uniform"),
            overwrite=True,
        )
        return output.read_bytes()[-16:]

    assert update("a", 7) == update("a", 7)
    assert len({update(client, 7) for client in "abcdef"}) > 1
