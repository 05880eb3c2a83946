"""A model of your own: any `nn.Module`, made by a function without arguments.

fedpara-edge export examples/own_model.py:net --input-shape 3,32,32 -o own
"""

import torch
from torch import nn


class Block(nn.Module):
    """A convolution with GroupNorm around a residual sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(8, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] to the same shape."""
        return x + torch.nn.functional.silu(self.norm(self.conv(x)))


def net() -> nn.Module:
    """For float images [N, 3, 32, 32] and 5 classes."""
    stem = [nn.Conv2d(3, 128, 4, stride=4), nn.GELU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, 5)]
    return nn.Sequential(*stem, Block(128), Block(128), *head)
