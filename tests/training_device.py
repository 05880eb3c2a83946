"""A device that trains a softmax regression, and is interrupted."""

import signal
from dataclasses import replace

from softmax_regression import SoftmaxRegression, make_bundle, write_npz

from device_runtime import TrainConfig, open_data, train
from fedpara_edge.codecs import find_encoder
from fedpara_edge.formats.bundle import WEIGHTS, open_bundle
from fedpara_edge.formats.weights import read_weights, write_weights

CONFIG = TrainConfig(epochs=3, batch_size=5, lr=0.2, seed=7, schedule="cosine", save_steps=4)
STEPS = 15  # 23 examples in batches of 5, 3 epochs


def make_inputs(folder):
    """Write a bundle and data to a folder."""
    make_bundle(folder / "bundle")
    write_npz(folder / "data.npz")


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


def go_on(device, folder):
    """Have a device go on to the next round."""
    device.output = folder / "second.safetensors"
    device.weights = next_weights(device, folder)


def next_weights(device, folder):
    """The weights of the next round."""
    base = read_weights(device.weights)
    path = folder / "next.safetensors"
    write_weights(path, replace(base, round=base.round + 1, tensors={k: v + 0.25 for k, v in base.tensors.items()}))
    return path
