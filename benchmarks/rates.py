"""Rates at which factored models train beside the dense one, from two initializations: python benchmarks/rates.py

For each model the mean loss of the last ten steps, of three seeds, at some rates of SGD and AdamW; `nan` where training
diverged. Images are those of the demo; the other data is made here. With names of models as arguments, those alone. The
zoo's large models, at one rate of each optimizer, take ten minutes a row on a core; a GPU is used if there is one.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpara_edge.factors.factorization import BatchNorm, Factorization, Init
from fedpara_edge.nn import ZOO, convert, load_model

ROOT = Path(__file__).parents[1]
SEEDS, BATCH, LAST = 3, 32, 10
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ARMS: tuple[Init | None, ...] = (None, "composed", "own")
Data = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model with data, and the rates to try.

    Args:
        model: Function that makes the dense model.
        data: Function that makes inputs and labels.
        steps: Number of steps.
        sgd: Rates of SGD.
        adamw: Rates of AdamW.
        exclude: Patterns of the layers that stay dense.
        batchnorm: What becomes of BatchNorms where layers are factored.
    """

    model: Callable[[], nn.Module]
    data: Callable[[], Data]
    steps: int
    sgd: Sequence[float]
    adamw: Sequence[float]
    exclude: tuple[str, ...] = ()
    batchnorm: BatchNorm = "refuse"


def images() -> Data:
    """Images of Fashion-MNIST and their classes."""
    with np.load(ROOT / "fedpara_edge" / "demo" / "fashion_mnist_12k.npz") as arrays:
        x, y = torch.from_numpy(arrays["x_train"][:1500]), torch.from_numpy(arrays["y_train"][:1500])
    return (x.reshape(-1, 1, 28, 28).float() / 255 - 0.286) / 0.353, y.long()


def colour_images() -> Data:
    """The same as images [1500, 3, 32, 32]."""
    x, y = images()
    return F.pad(x, (2, 2, 2, 2), value=x.min().item()).expand(-1, 3, -1, -1).contiguous(), y


def text() -> Data:
    """Stretches of 80 characters of the licence, and the characters one further."""
    letters = (ROOT / "LICENSE").read_text(encoding="utf-8")
    stretches = torch.tensor([min(max(ord(letter) - 32, 0), 79) for letter in letters]).unfold(0, 81, 2)
    return stretches[:, :-1].contiguous(), stretches[:, 1:].contiguous()


def tones(steps: int = 400) -> Data:
    """Noisy tones of four frequencies [400, 1, steps]."""
    generator, labels = torch.Generator().manual_seed(5), torch.arange(400) % 4
    angles = torch.arange(steps) * (0.05 + 0.1 * labels[:, None]) + 6 * torch.rand(400, 1, generator=generator)
    return (angles.sin() + 0.5 * torch.randn(400, steps, generator=generator)).unsqueeze(1), labels


def windows() -> Data:
    """The same as windows [400, 100, 6] of six sensors."""
    x, labels = tones(100)
    noise = torch.randn(400, 100, 6, generator=torch.Generator().manual_seed(6))
    return x.mT + 0.5 * noise, labels


def levels() -> Data:
    """Windows [400, 6, 100], and a number to predict for each."""
    x = windows()[0].mT.contiguous()
    y = x[:, 0].std(1) + 3 * x[:, 0, ::7].mean(1)
    return x, (y - y.mean()) / y.std()


def numbers() -> Data:
    """Sixteen numbers, and one to predict."""
    generator = torch.Generator().manual_seed(100)
    x, w = torch.randn(512, 16, generator=generator), torch.randn(16, generator=generator) / 4
    y = torch.sin(2 * x @ w) + 0.5 * x[:, 0] * x[:, 1]
    return x, (y - y.mean()) / y.std()


class Wave(nn.Module):
    """Convolutions over time with GroupNorm, then a transformer encoder, as in Wav2Vec 2."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, kernel, stride in ((1, 10, 5), (32, 3, 2), (32, 3, 2)):
            layers += [nn.Conv1d(inputs, 32, kernel, stride), nn.GroupNorm(8, 32), nn.GELU()]
        self.features = nn.Sequential(*layers)
        encoder = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(encoder, 2), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 1, T] to [N, 4]."""
        logits: Tensor = self.head(self.encoder(self.features(x).mT).mean(1))
        return logits


def plain(*widths: int, flat: bool = False) -> nn.Module:
    """Linear layers with ReLU between them; of one output, without its dimension if `flat`."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1], *([nn.Flatten(0)] if flat else []))


def convolutions() -> nn.Module:
    """Three convolutions over time and two linear layers, without normalization, to one number."""
    body = [nn.Conv1d(6, 32, 5, padding=2), nn.ReLU(), nn.Conv1d(32, 64, 5, 2), nn.ReLU(), nn.Conv1d(64, 64, 5, 2)]
    return nn.Sequential(*body, nn.ReLU(), *plain(64 * 22, 64, 1, flat=True))


def zoo_task(name: str, *, classes: int | None = None, **settings: Any) -> Task:
    """A model of the zoo, with the layers dense that it leaves dense."""
    return Task(
        model=lambda: load_model(name, classes=classes),
        exclude=ZOO[name].dense_layers,
        batchnorm=ZOO[name].batchnorm,
        **settings,
    )


TASKS = {
    "regression": Task(
        model=lambda: plain(16, 128, 1, flat=True), data=numbers, steps=150, sgd=(0.05, 0.1), adamw=(0.003, 0.01)
    ),
    "deep regression": Task(
        model=lambda: plain(16, 128, 128, 128, 1, flat=True),
        data=numbers,
        steps=150,
        sgd=(0.05, 0.1),
        adamw=(0.001, 0.003),
    ),
    "conv regression": Task(model=convolutions, data=levels, steps=80, sgd=(0.03, 0.1), adamw=(0.001, 0.003)),
    "deep mlp": Task(
        model=lambda: plain(784, 128, 128, 128, 128, 10), data=images, steps=100, sgd=(0.1, 0.2), adamw=(0.001, 0.003)
    ),
    "wave": Task(model=Wave, data=tones, steps=60, sgd=(0.05, 0.1, 0.3), adamw=(0.001, 0.003)),
    "mlp": zoo_task("mlp", data=images, steps=100, sgd=(0.1, 0.2), adamw=(0.001, 0.003)),
    "cnn": zoo_task("cnn", data=images, steps=40, sgd=(0.1, 0.2), adamw=(0.001, 0.003)),
    "har-transformer": zoo_task(
        "har-transformer", classes=4, data=windows, steps=50, sgd=(0.05, 0.1), adamw=(0.001, 0.003)
    ),
    "char-lstm": zoo_task("char-lstm", data=text, steps=100, sgd=(1.0, 3.0), adamw=(0.003, 0.01)),
    "mobilenetv2-0.25": zoo_task(
        "mobilenetv2-0.25", data=colour_images, steps=60, sgd=(0.1, 0.2), adamw=(0.001, 0.003)
    ),
    "mobilenetv3-small": zoo_task(
        "mobilenetv3-small", data=colour_images, steps=60, sgd=(0.1, 0.2), adamw=(0.001, 0.003)
    ),
    "resnet18": zoo_task("resnet18", data=colour_images, steps=60, sgd=(0.1,), adamw=(0.001,)),
    "vgg16": zoo_task("vgg16", data=colour_images, steps=60, sgd=(0.05,), adamw=(0.001,)),
}


def make(task: Task, init: Init | None, seed: int) -> nn.Module:
    """Model of a task: dense, or factored with an initialization."""
    torch.manual_seed(seed)
    model = task.model()
    if init is not None:
        model, _ = convert(model, Factorization(init=init, exclude=task.exclude, batchnorm=task.batchnorm))
    return model


def train(
    task: Task, data: Data, init: Init | None, optimizer: str, rate: float, seed: int, **constants: float
) -> float:
    """Mean loss of the last steps; nan if it diverged."""
    model = make(task, init, seed).to(DEVICE)
    kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    stepping = kind(model.parameters(), lr=rate, **constants)
    (x, y), losses = (each.to(DEVICE) for each in data), []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(task.steps):
        rows = torch.randint(len(x), (BATCH,), generator=generator).to(DEVICE)
        outputs = model(x[rows])
        loss = F.mse_loss(outputs, y[rows]) if y.is_floating_point() else F.cross_entropy(outputs, y[rows])
        stepping.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        stepping.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return math.nan
    return float(np.mean(losses[-LAST:]))


def main(names: Sequence[str]) -> None:
    """Print a row of a table for each model, optimizer and rate."""
    torch.set_num_threads(1)
    print("| model | optimizer, rate | dense | composed | own |\n|---|---|---|---|---|")
    for name in names or TASKS:
        task = TASKS[name]
        data = task.data()
        for optimizer, rates in (("sgd", task.sgd), ("adamw", task.adamw)):
            for rate in rates:
                cells = [
                    " ".join(f"{train(task, data, init, optimizer, rate, seed):.2f}" for seed in range(SEEDS))
                    for init in ARMS
                ]
                print(f"| {name} | {optimizer} {rate} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
