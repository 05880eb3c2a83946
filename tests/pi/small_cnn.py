"""The model that the emulated Raspberry Pis train."""

from torch import nn


def net() -> nn.Module:
    """Images [B, 1, 28, 28] to logits [B, 10]: small, with most kinds of layers that could compute otherwise on ARM.

    It has no ReLU and no max-pooling, as rounding decides on which side of their kinks a value lies: two machines that
    differ by 1e-7 would then differ by 1e-3 a few steps later, and by what was learned an epoch later.
    """
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.SiLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(784, 64),
        nn.SiLU(),
        nn.Linear(64, 10),
    )
