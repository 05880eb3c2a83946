"""Rows of tables [columns]."""

from __future__ import annotations

import torch
from torch import nn

from architectures.architecture import Architecture, Block, Residual

COLUMNS = 16


def mlp() -> nn.Module:
    """Linear layers with ReLU, one output."""
    return nn.Sequential(
        nn.Linear(COLUMNS, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1), nn.Flatten(0)
    )


def resnet() -> nn.Module:
    """Residual blocks with BatchNorm."""

    def block() -> nn.Module:
        return Residual(nn.Sequential(nn.BatchNorm1d(48), nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 48)))

    return nn.Sequential(nn.Linear(COLUMNS, 48), block(), block(), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 4))


class FeatureTokens(nn.Module):
    """A token for every column, and one for the result, through a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(0.3 * torch.randn(COLUMNS, 24)), nn.Parameter(torch.zeros(COLUMNS, 24))
        self.token = nn.Parameter(0.3 * torch.randn(1, 1, 24))
        self.body, self.head = nn.Sequential(Block(24, 2), Block(24, 2)), nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.unsqueeze(2) * self.weight + self.bias
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], 1)
        return self.head(self.body(tokens)[:, 0])


class DeepCross(nn.Module):
    """Products of the columns beside a deep network."""

    def __init__(self) -> None:
        super().__init__()
        self.crosses = nn.ModuleList(nn.Linear(COLUMNS, COLUMNS) for _ in range(2))
        self.deep = nn.Sequential(nn.Linear(COLUMNS, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.head = nn.Linear(COLUMNS + 32, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for cross in self.crosses:
            y = x * cross(y) + y
        return self.head(torch.cat([y, self.deep(x)], 1))


def self_normalizing() -> nn.Module:
    """SELU, which needs no normalization."""
    return nn.Sequential(nn.Linear(COLUMNS, 64), nn.SELU(), nn.Linear(64, 64), nn.SELU(), nn.Linear(64, 4))


class Experts(nn.Module):
    """Several small networks, mixed by a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(COLUMNS, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(COLUMNS, 32), nn.ReLU(), nn.Linear(32, 4)) for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shares = torch.softmax(self.gate(x), 1)
        return (torch.stack([expert(x) for expert in self.experts], 1) * shares.unsqueeze(2)).sum(1)


ARCHITECTURES = (
    Architecture(name="tabular MLP", make=mlp, shape=(COLUMNS,), loss="mse"),
    Architecture(name="tabular ResNet", make=resnet, shape=(COLUMNS,), batchnorm="group"),
    Architecture(name="FT-Transformer", make=FeatureTokens, shape=(COLUMNS,)),
    Architecture(name="Deep & Cross", make=DeepCross, shape=(COLUMNS,), loss="bce"),
    Architecture(name="SELU network", make=self_normalizing, shape=(COLUMNS,)),
    Architecture(name="mixture of experts", make=Experts, shape=(COLUMNS,)),
)
