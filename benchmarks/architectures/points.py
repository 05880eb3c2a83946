"""Sets of points [points, coordinates], and coordinates that stand for an image."""

from __future__ import annotations

import torch
from torch import nn

from architectures.architecture import Architecture


class DeepSets(nn.Module):
    """The sum over all points of what is made of each."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 32))
        self.all = nn.Sequential(nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.all(self.each(x).sum(1))


class PointNet(nn.Module):
    """The maximum over all points of what is made of each."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Sequential(
            nn.Conv1d(3, 32, 1), nn.BatchNorm1d(32), nn.ReLU(), nn.Conv1d(32, 64, 1), nn.BatchNorm1d(64), nn.ReLU()
        )
        self.all = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.all(self.each(x.transpose(1, 2)).amax(2))


class Sine(nn.Module):
    """sin(ω (W x + b)), with the weights of SIREN."""

    def __init__(self, inputs: int, outputs: int, *, first: bool = False) -> None:
        super().__init__()
        self.linear, self.frequency = nn.Linear(inputs, outputs), 30.0
        bound = 1 / inputs if first else (6 / inputs) ** 0.5 / self.frequency
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(self.frequency * self.linear(x))


def siren() -> nn.Module:
    """Sines of sines."""
    return nn.Sequential(Sine(2, 32, first=True), Sine(32, 32), Sine(32, 32), nn.Linear(32, 3))


ARCHITECTURES = (
    Architecture(name="DeepSets", make=DeepSets, shape=(20, 3)),
    Architecture(name="PointNet", make=PointNet, shape=(20, 3), batchnorm="group"),
    Architecture(name="SIREN", make=siren, shape=(2,), loss="mse", rate=1e-4),
)
