"""A net for images of one channel whose first convolution has few parameters, to which factors do the most harm."""

from torch import nn


def net() -> nn.Module:
    """Net for images [1, 28, 28] of ten classes, which it halves first."""
    return nn.Sequential(
        nn.AvgPool2d(2),
        nn.Conv2d(1, 32, 3, padding=1),
        nn.GroupNorm(8, 32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.GroupNorm(8, 64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1),
        nn.GroupNorm(8, 128),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
