"""Networks for phones: depthwise, grouped and pointwise convolutions, squeezes and excitations."""

from __future__ import annotations

import torch
from torch import nn

from architectures.architecture import Architecture, Residual


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, *, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


def _head(width: int, classes: int = 10) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]


def mobilenet_v1() -> nn.Module:
    """Depthwise separable convolutions."""
    layers = [*_conv(3, 16, 3, 2), nn.ReLU6()]
    for inputs, outputs, stride in ((16, 32, 1), (32, 64, 2), (64, 64, 1)):
        layers += [*_conv(inputs, inputs, 3, stride, groups=inputs), nn.ReLU6(), *_conv(inputs, outputs, 1), nn.ReLU6()]
    return nn.Sequential(*layers, *_head(64))


class Squeeze(nn.Module):
    """Channels scaled by what their means say."""

    def __init__(self, width: int, gate: nn.Module) -> None:
        super().__init__()
        self.scale = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width // 4, 1), nn.ReLU(), nn.Conv2d(width // 4, width, 1), gate
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale(x)


def _inverted(
    inputs: int, outputs: int, stride: int, activation: type[nn.Module], gate: type[nn.Module] | None = None
) -> nn.Module:
    """Inverted bottleneck: wide inside, narrow and linear at its ends."""
    width = 4 * inputs
    body = nn.Sequential(
        *_conv(inputs, width, 1),
        activation(),
        *_conv(width, width, 3, stride, groups=width),
        activation(),
        *([] if gate is None else [Squeeze(width, gate())]),
        *_conv(width, outputs, 1),
    )
    return Residual(body) if stride == 1 and inputs == outputs else body


def mobilenet_v2() -> nn.Module:
    """Inverted bottlenecks."""
    blocks = [_inverted(i, o, s, nn.ReLU6) for i, o, s in ((8, 16, 1), (16, 24, 2), (24, 24, 1), (24, 32, 2))]
    return nn.Sequential(*_conv(3, 8, 3, 2), nn.ReLU6(), *blocks, *_conv(32, 128, 1), nn.ReLU6(), *_head(128))


def mobilenet_v3() -> nn.Module:
    """Inverted bottlenecks with squeezes and hard activations."""
    blocks = [_inverted(i, o, s, nn.Hardswish, nn.Hardsigmoid) for i, o, s in ((8, 16, 2), (16, 16, 1), (16, 24, 2))]
    return nn.Sequential(*_conv(3, 8, 3, 2), nn.Hardswish(), *blocks, *_conv(24, 96, 1), nn.Hardswish(), *_head(96))


def efficientnet() -> nn.Module:
    """Inverted bottlenecks with squeezes and SiLU."""
    blocks = [_inverted(i, o, s, nn.SiLU, nn.Sigmoid) for i, o, s in ((8, 16, 1), (16, 24, 2), (24, 24, 1))]
    return nn.Sequential(*_conv(3, 8, 3, 2), nn.SiLU(), *blocks, *_conv(24, 96, 1), nn.SiLU(), *_head(96))


def squeezenet() -> nn.Module:
    """Fire modules: a narrow convolution, then wide ones side by side."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        Fire(16, 8, 24),
        Fire(48, 8, 24),
        nn.Conv2d(48, 10, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


class Fire(nn.Module):
    """Fire module."""

    def __init__(self, inputs: int, narrow: int, wide: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, narrow, 1)
        self.one, self.three = nn.Conv2d(narrow, wide, 1), nn.Conv2d(narrow, wide, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.squeeze(x))
        return torch.relu(torch.cat([self.one(x), self.three(x)], 1))


class Shuffle(nn.Module):
    """Half of the channels convolved, and the channels of both halves shuffled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.body = nn.Sequential(
            *_conv(half, half, 1), nn.ReLU(), *_conv(half, half, 3, groups=half), *_conv(half, half, 1), nn.ReLU()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept, changed = x.chunk(2, 1)
        y = torch.stack([kept, self.body(changed)], 2)
        return y.flatten(1, 2)


def shufflenet() -> nn.Module:
    """Units that shuffle their channels."""
    first = [*_conv(3, 24, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*first, Shuffle(24), Shuffle(24), *_conv(24, 64, 1), nn.ReLU(), *_head(64))


class Ghost(nn.Module):
    """Half of the channels from a convolution, the other half from a cheap one of these."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.main = nn.Sequential(*_conv(inputs, half, 1), nn.ReLU())
        self.cheap = nn.Sequential(*_conv(half, half, 3, groups=half), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.main(x)
        return torch.cat([x, self.cheap(x)], 1)


def ghostnet() -> nn.Module:
    """Ghost modules."""
    return nn.Sequential(*_conv(3, 16, 3, 2), nn.ReLU(), Ghost(16, 32), nn.MaxPool2d(2), Ghost(32, 48), *_head(48))


IMAGE = (3, 32, 32)
ARCHITECTURES = (
    Architecture(name="MobileNetV1", make=mobilenet_v1, shape=IMAGE, batchnorm="group"),
    Architecture(name="MobileNetV2", make=mobilenet_v2, shape=IMAGE, batchnorm="group"),
    Architecture(name="MobileNetV2 frozen", make=mobilenet_v2, shape=IMAGE, batchnorm="freeze"),
    Architecture(name="MobileNetV3", make=mobilenet_v3, shape=IMAGE, batchnorm="group"),
    Architecture(name="EfficientNet", make=efficientnet, shape=IMAGE, batchnorm="group"),
    Architecture(name="SqueezeNet", make=squeezenet, shape=IMAGE),
    Architecture(name="ShuffleNet", make=shufflenet, shape=IMAGE, batchnorm="group"),
    Architecture(name="GhostNet", make=ghostnet, shape=IMAGE, batchnorm="group"),
)
