"""A class for every pixel."""

from __future__ import annotations

import torch
from torch import nn

from architectures.architecture import Architecture


def _double(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU()
    )


class UNet(nn.Module):
    """Down by pooling and up by transposed convolutions, with what came before beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = _double(3, 8), _double(8, 16), _double(16, 32)
        self.up2, self.join2 = nn.ConvTranspose2d(32, 16, 2, 2), _double(32, 16)
        self.up1, self.join1 = nn.ConvTranspose2d(16, 8, 2, 2), _double(16, 8)
        self.pool, self.head = nn.MaxPool2d(2), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = self.down1(x)
        two = self.down2(self.pool(one))
        y = self.join2(torch.cat([self.up2(self.bottom(self.pool(two))), two], 1))
        return self.head(self.join1(torch.cat([self.up1(y), one], 1)))


def fcn() -> nn.Module:
    """Convolutions down, classes, and an interpolation up."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(32, 4, 1),
        nn.Upsample(scale_factor=4, mode="bilinear"),
    )


def dilated() -> nn.Module:
    """Convolutions that see ever farther at full resolution."""
    layers: list[nn.Module] = []
    for inputs, outputs, dilation in ((3, 16, 1), (16, 16, 2), (16, 16, 4)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation),
            nn.GroupNorm(4, outputs),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.Conv2d(16, 4, 1))


ARCHITECTURES = (
    Architecture(name="U-Net", make=UNet, shape=(3, 16, 16)),
    Architecture(name="FCN", make=fcn, shape=(3, 16, 16)),
    Architecture(name="dilated CNN", make=dilated, shape=(3, 16, 16)),
)
