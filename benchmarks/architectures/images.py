"""Convolutional networks for small images, and autoencoders."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from architectures.architecture import Architecture, Residual


def lenet() -> nn.Module:
    """Convolutions and average pools, then linear layers."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 84),
        nn.Tanh(),
        nn.Linear(84, 10),
    )


def group_resnet() -> nn.Module:
    """Residual blocks with GroupNorm."""

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.GroupNorm(8, outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.GroupNorm(8, outputs),
        )
        same = stride == 1 and inputs == outputs
        return nn.Sequential(
            Residual(body, None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)), nn.ReLU()
        )

    return nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), block(16, 16, 1), block(16, 32, 2), block(32, 64, 2), *_head(64))


def one_channel_groups() -> nn.Module:
    """GroupNorm with a few channels a group after a first convolution of one channel."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, *_head(64))


class Dense(nn.Module):
    """Layers that each see all that came before."""

    def __init__(self, inputs: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(inputs + n * growth), nn.ReLU(), nn.Conv2d(inputs + n * growth, growth, 3, padding=1)
            )
            for n in range(layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


def densenet() -> nn.Module:
    """Dense blocks with a transition between them."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        Dense(16, 8, 3),
        nn.Conv2d(40, 20, 1),
        nn.AvgPool2d(2),
        Dense(20, 8, 3),
        *_head(44),
    )


def convnext() -> nn.Module:
    """Depthwise convolutions of a large kernel, LayerNorm over channels, and wide pointwise layers."""
    return nn.Sequential(
        nn.Conv2d(3, 24, 4, 4), NextBlock(24), NextBlock(24), nn.Conv2d(24, 48, 2, 2), NextBlock(48), *_head(48)
    )


class NextBlock(nn.Module):
    """Block of a ConvNeXt."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(0.1 * torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.mix(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.narrow(F.gelu(self.wide(y)))).permute(0, 3, 1, 2)


class Inception(nn.Module):
    """Convolutions of several kernels side by side."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.paths = nn.ModuleList(nn.Conv2d(inputs, width, kernel, padding=kernel // 2) for kernel in (1, 3, 5))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(inputs, width, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(torch.cat([path(x) for path in (*self.paths, self.pooled)], 1))


def inception() -> nn.Module:
    """Two inceptions."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), Inception(16, 8), nn.MaxPool2d(2), Inception(32, 16), *_head(64)
    )


class Autoencoder(nn.Module):
    """Strided convolutions down, and transposed ones up again."""

    def __init__(self, *, doubled: bool) -> None:
        super().__init__()
        self.doubled = doubled
        self.down = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 24)
        )
        self.up = nn.Sequential(
            nn.Linear(12 if doubled else 24, 256),
            nn.ReLU(),
            nn.Unflatten(1, (16, 4, 4)),
            nn.ConvTranspose2d(16, 8, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 1, 4, 2, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        code = self.down(x)
        if self.doubled:  # as a VAE, with a noise that is always the same
            mean, variance = code.chunk(2, 1)
            code = mean + 0.1 * torch.exp(variance / 2)
        return self.up(code)


class Cosine(nn.Module):
    """Features compared with a direction for each class."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 16, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(784, 32), nn.ReLU())
        self.directions = nn.Parameter(torch.randn(10, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 10 * F.linear(F.normalize(self.features(x)), F.normalize(self.directions))


def _head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]


ARCHITECTURES = (
    Architecture(name="LeNet", make=lenet, shape=(1, 28, 28)),
    Architecture(name="ResNet with GroupNorm", make=group_resnet, shape=(3, 16, 16)),
    Architecture(name="CNN with GroupNorm", make=one_channel_groups, shape=(1, 28, 28)),
    Architecture(name="DenseNet", make=densenet, shape=(3, 32, 32), batchnorm="group"),
    Architecture(name="ConvNeXt", make=convnext, shape=(3, 32, 32)),
    Architecture(name="Inception", make=inception, shape=(3, 32, 32)),
    Architecture(name="autoencoder", make=lambda: Autoencoder(doubled=False), shape=(1, 16, 16), loss="mse"),
    Architecture(name="VAE", make=lambda: Autoencoder(doubled=True), shape=(1, 16, 16), loss="mse"),
    Architecture(name="cosine head", make=Cosine, shape=(1, 16, 16)),
)
