"""An architecture: a model and what it is trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """An architecture.

    Args:
        name: Name in the table.
        make: Function that makes the model with new weights.
        shape: Shape of one input.
        tokens: Number of tokens of an int64 input; None for float32.
        loss: Loss that it is trained with.
        batchnorm: What becomes of its BatchNorms; None if it has none.
        rate: Learning rate of the training steps.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tokens: int | None = None
    loss: str = "cross_entropy"
    batchnorm: str | None = None
    rate: float = 0.01


class Residual(nn.Module):
    """x + f(x), or shortcut(x) + f(x)."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.shortcut = body, nn.Identity() if shortcut is None else shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shortcut(x) + self.body(x)


class Applied(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., torch.Tensor], *arguments: Any) -> None:
        super().__init__()
        self.function, self.arguments = function, arguments

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, *self.arguments)


class Block(nn.Module):
    """Transformer block with the normalization first; attends to earlier positions only if it is causal."""

    def __init__(self, width: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        split = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class Positions(nn.Module):
    """Learned positions, added to [B, T, C]."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.positions


def mean_over_time(x: torch.Tensor) -> torch.Tensor:
    """[B, T, C] to [B, C]."""
    return x.mean(1)


def last(x: torch.Tensor) -> torch.Tensor:
    """[B, T, C] to its last position."""
    return x[:, -1]


def swap(x: torch.Tensor) -> torch.Tensor:
    """[B, T, C] to [B, C, T] and back."""
    return x.transpose(1, 2)


class First(nn.Module):
    """First of the results of a recurrent network."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)[0]


def two_convolutions(inputs: int, outputs: int, kernel: int) -> nn.Module:
    """Body of a residual block over time, [B, inputs, T] to [B, outputs, T / 2]."""
    return nn.Sequential(
        nn.Conv1d(inputs, outputs, kernel, 2, kernel // 2, bias=False),
        nn.BatchNorm1d(outputs),
        nn.ReLU(),
        nn.Conv1d(outputs, outputs, kernel, 1, kernel // 2, bias=False),
        nn.BatchNorm1d(outputs),
    )
