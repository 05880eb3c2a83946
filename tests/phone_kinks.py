"""How far engines move from double precision in a few steps, with and without kinks in the model.

usage: python tests/phone_kinks.py [MODEL ...]

Prints, for each model, how far the change of onnxruntime-web, under Node, is from that of onnxruntime, and how far each
of the two is from that of torch in double precision. Where a model has no kinks (`smooth` has GELU and mean pooling in
place of ReLU and max pooling), they stay where rounding is. Where it has, either may be far off: a value that is
rounded to the other side of a kink gets another gradient.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from norms import relative_error
from numpy.typing import NDArray
from phone_tools import PHONE, run_node
from small_net import without_verification
from torch import nn
from torch.nn import functional as F

from device_runtime import TrainConfig, open_data, open_engine, train
from device_runtime.batches import epoch_batches, epoch_order
from export import export_bundle
from export.exporter import deploy
from fedpara_edge.codecs import find_encoder
from fedpara_edge.codecs.codec import in_order
from fedpara_edge.demo import IMAGES
from fedpara_edge.formats.bundle import WEIGHTS, Bundle
from fedpara_edge.formats.encoded import read_change
from fedpara_edge.formats.inputs import InputDtype
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.formats.update import open_update
from fedpara_edge.formats.weights import Weights, read_weights, write_weights
from fedpara_edge.nn.zoo import ZOO

STEPS = (1, 5)
NEAR, SAME, CANDIDATES = 5e-6, 1e-12, 4
KINDS = (
    *("orders", "step_seeds", "micro_batch_seeds", "random_floats", "rates"),
    *("data", "codecs", "weights", "refusals", "signatures"),
)


def smoothed(model: nn.Module, kinds: dict[type[nn.Module], Callable[[], nn.Module]]) -> nn.Module:
    """A model with other activations and poolings."""
    for name, child in model.named_children():
        replaced = kinds.get(type(child))
        setattr(model, name, replaced() if replaced else smoothed(child, kinds))
    return model


def cnn() -> nn.Module:
    return ZOO["cnn"].factory()


def mean_pool() -> nn.Module:
    return nn.AvgPool2d(2)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "cnn": (cnn, (1, 28, 28), 32),
    "cnn, max pooling alone": (lambda: smoothed(cnn(), {nn.ReLU: nn.GELU}), (1, 28, 28), 32),
    "cnn, ReLU alone": (lambda: smoothed(cnn(), {nn.MaxPool2d: mean_pool}), (1, 28, 28), 32),
    "cnn, smooth": (lambda: smoothed(cnn(), {nn.ReLU: nn.GELU, nn.MaxPool2d: mean_pool}), (1, 28, 28), 32),
    "char-lstm": (lambda: ZOO["char-lstm"].factory(), (80,), 8),
    "resnet18": (lambda: ZOO["resnet18"].factory(), (3, 32, 32), 8),
    "resnet18, smooth": (lambda: smoothed(ZOO["resnet18"].factory(), {nn.ReLU: nn.GELU}), (3, 32, 32), 8),
}


def write_data(path: Path, shape: tuple[int, ...], rows: int) -> None:
    """Examples: Fashion-MNIST for gray images, and random ones for others."""
    random = np.random.default_rng(0)
    if shape == (1, 28, 28):
        with np.load(IMAGES) as images:
            np.savez(
                path, x=images["x_train"][:rows].reshape(rows, *shape), y=images["y_train"][:rows].astype(np.int64)
            )
    elif len(shape) == 1:
        text = random.integers(0, 80, (rows, shape[0] + 1))
        np.savez(path, x=text[:, :-1], y=text[:, 1:])
    else:
        np.savez(path, x=random.integers(0, 256, (rows, *shape), np.uint8), y=random.integers(0, 10, rows))


def change_in(update: Path, weights: Weights) -> NDArray[np.float32]:
    opened = open_update(update, weights)
    try:
        return read_change(opened.file, in_order(weights.layout.shared))
    finally:
        opened.close()


def native(bundle: Bundle, folder: Path, weights: Weights, name: str, settings: dict[str, Any]) -> NDArray[np.float32]:
    """Change of the Python device from some weights."""
    path = folder / f"{name}.weights"
    write_weights(path, weights)
    engine, data = open_engine(bundle, "onnxruntime", threads=1), open_data(folder / "data.npz", bundle.manifest)
    train(
        engine, data, path, TrainConfig(**settings), output=folder / f"{name}.update", encoder=find_encoder("float32")
    )
    return change_in(folder / f"{name}.update", weights)


def web(bundle: Bundle, folder: Path, settings: dict[str, Any]) -> NDArray[np.float32]:
    """Change of the phone's modules from the weights that `native` left."""
    call = {
        "name": "kinks", "bundle": bundle.path.name, "weights": "base.weights", "data": "data.npz", "client": "device",
        "settings": {**settings, "codec": "float32"}, "update": "web.update",
    }  # fmt: skip
    (folder / "vectors.json").write_text(
        json.dumps({**{kind: [] for kind in KINDS}, "calls": [call]}), encoding="utf-8"
    )
    run_node(PHONE / "answers.mjs", folder, folder)
    return change_in(folder / "web.update", read_weights(folder / "base.weights"))


class ExactSteps:
    """Steps of SGD in double precision, in torch.

    Args:
        model: Model with its initial weights.
        config: Configuration of its export.
        learning_rate: Learning rate.
    """

    def __init__(self, model: nn.Module, config: ExportConfig, learning_rate: float) -> None:
        self._model = deploy(model, config).double()
        self._model.dtype = torch.float64
        self._optimizer = torch.optim.SGD(self._model.parameters(), learning_rate)
        self._initial = self._weights()

    def step(self, x: NDArray[Any], y: NDArray[Any]) -> None:
        """Take a step on a batch."""
        self._optimizer.zero_grad()
        F.cross_entropy(self._model(torch.from_numpy(x)), torch.from_numpy(y)).backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()

    def change(self, bundle: Bundle) -> NDArray[np.float64]:
        """Change of the tensors of a bundle since the initial weights."""
        weights = self._weights()
        return np.concatenate(
            [
                (weights[spec.name] - self._initial[spec.name]).reshape(-1)
                for spec in in_order(bundle.manifest.layout.shared)
            ]
        )

    def is_untied(self, x: NDArray[Any]) -> NDArray[np.bool_]:
        """Whether no window of a 2x2 max pooling behind a ReLU has a near tie, for each example.

        A near tie is one of the two largest values, or of the largest and zero. Values that are equal but for the
        rounding of double precision have equal patches of the image below them, and any of them has the same gradient.
        """
        untied = np.ones(len(x), np.bool_)

        def look(_: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            patches = F.unfold(inputs[0].flatten(0, 1)[:, None], 2, stride=2)
            second, first = patches.sort(1).values[:, -2:].unbind(1)
            gaps = torch.stack([torch.where(first > 0, first - second, 1.0), first.abs()])
            near = ((gaps < NEAR) & (gaps > SAME)).any(0).any(1)
            untied[near.view(inputs[0].shape[:2]).any(1).numpy()] = False

        hooks = [
            module.register_forward_pre_hook(look) for module in self._model.modules() if isinstance(module, nn.ReLU)
        ]
        with torch.no_grad():
            self._model(torch.from_numpy(x))
        for hook in hooks:
            hook.remove()
        return untied

    def _weights(self) -> dict[str, NDArray[np.float64]]:
        return {name: values.detach().numpy().copy() for name, values in self._model.model.named_parameters()}


def write_untied_data(path: Path, exact: ExactSteps, settings: dict[str, Any], *, steps: int, first: int = 0) -> None:
    """Examples without near ties in any step, each batch chosen with the weights before its step, which is taken.

    Args:
        path: File to write.
        exact: Steps, which are taken.
        settings: Settings of the training: `batch_size` and `seed`.
        steps: Number of steps.
        first: Number of the image from which on to choose.
    """
    size = settings["batch_size"]
    with np.load(IMAGES) as images:
        x, y = images["x_train"].reshape(-1, 1, 28, 28), images["y_train"].astype(np.int64)
    chosen: list[int] = []
    for number in range(steps):
        begin = chosen[-1] + 1 if chosen else first
        candidates = begin + np.arange(CANDIDATES * size)
        batch = candidates[exact.is_untied(x[candidates])][:size]
        assert len(batch) == size, f"step {number}: only {len(batch)} examples without near ties"
        chosen += batch.tolist()
        exact.step(x[batch], y[batch])
    order = epoch_order(len(chosen), seed=settings["seed"], epoch=0)
    placed = np.empty(len(chosen), np.int64)
    placed[order] = chosen
    np.savez(path, x=x[placed], y=y[placed])


def differences(name: str, steps: int) -> tuple[float, ...]:
    """Relative differences of changes: onnxruntime-web from onnxruntime, and either from the exact one."""
    make, shape, batch = MODELS[name]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        torch.manual_seed(0)
        dtype: InputDtype = "int64" if len(shape) == 1 else "uint8"
        tokens = {"tokens": 80} if dtype == "int64" else {"mean": (0.286,), "std": (0.353,)}
        config = ExportConfig(name=name, input_shape=shape, input_dtype=dtype, engines=("onnxruntime",), **tokens)
        model, data = make(), folder / "data.npz"
        with without_verification():
            bundle, *_ = export_bundle(model, folder / "bundle", config)
        write_data(data, shape, steps * batch)
        settings = {"batch_size": batch, "lr": 0.05, "seed": 1}
        expected = native(bundle, folder, read_weights(bundle.file(WEIGHTS)), "base", settings)
        of_web = web(bundle, folder, settings)
        exact = ExactSteps(model, config, settings["lr"])
        for inputs, labels in epoch_batches(open_data(data, bundle.manifest), batch_size=batch, seed=1, epoch=0):
            exact.step(inputs["x"], labels["y"])
        change = exact.change(bundle)
        return relative_error(of_web, expected), relative_error(of_web, change), relative_error(expected, change)


def main() -> None:
    columns = ("model", "steps", "web from native", "web from exact", "native from exact")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in sys.argv[1:] or MODELS:
        for steps in STEPS:
            found = " | ".join(f"{each:.1e}" for each in differences(name, steps))
            print(f"| {name} | {steps} | {found} |", flush=True)


if __name__ == "__main__":
    main()
