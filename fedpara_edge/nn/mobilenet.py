"""MobileNetV2 and MobileNetV3-small, whose tensors have the names that pretrained weights have in common.

Sources: Sandler et al. 2018, arXiv 1801.04381, table 2; Howard et al. 2019, arXiv 1905.02244, table 2. Images below
64x64 are halved three times instead of five: the first two of the halvings are left out, which changes no weight.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

SMALL_IMAGE = 64
"""Height or width below which two halvings are left out."""

V2_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, channels, blocks, and stride of the first block, by stage."""

V3_SMALL_BLOCKS = (
    (3, 16, 16, True, False, 2),
    (3, 72, 24, False, False, 2),
    (3, 88, 24, False, False, 1),
    (5, 96, 40, True, True, 2),
    (5, 240, 40, True, True, 1),
    (5, 240, 40, True, True, 1),
    (5, 120, 48, True, True, 1),
    (5, 144, 48, True, True, 1),
    (5, 288, 96, True, True, 2),
    (5, 576, 96, True, True, 1),
    (5, 576, 96, True, True, 1),
)
"""Kernel, expanded channels, channels, squeeze and excitation, hard swish instead of ReLU, and stride, by block."""


def rounded(channels: float) -> int:
    """Channels of a narrower or wider model: the nearest multiple of 8, but no more than a tenth below.

    >>> [rounded(0.25 * channels) for channels in (16, 24, 32, 96, 320)]
    [8, 8, 8, 24, 80]
    """
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


class MobileNetV2(nn.Module):
    """Inverted residuals between thin bottlenecks, then the usual head: mean, dropout and one linear layer.

    Args:
        classes: Number of classes.
        channels: Channels of an image.
        width: Multiplier of all channels, the last 1280 excepted where it is below 1.
        small: Whether to leave out the first two halvings, for images below 64x64.
    """

    def __init__(self, classes: int, channels: int = 3, *, width: float = 1.0, small: bool = False) -> None:
        super().__init__()
        strides = _Strides(small)
        norm = nn.BatchNorm2d
        outputs, last = rounded(32 * width), rounded(1280 * max(1.0, width))
        layers: list[nn.Module] = [_convolution(channels, outputs, 3, norm, nn.ReLU6, stride=strides.take(2))]
        for expansion, stage_channels, blocks, stride in V2_STAGES:
            for number in range(blocks):
                inputs, outputs = outputs, rounded(stage_channels * width)
                step = strides.take(stride) if number == 0 else 1
                layers.append(InvertedResidual(inputs, outputs, expansion, stride=step))
        self.features = nn.Sequential(*layers, _convolution(outputs, last, 1, norm, nn.ReLU6))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


class InvertedResidual(nn.Module):
    """Pointwise expansion, a depthwise convolution and a linear bottleneck, with a shortcut where shapes fit."""

    def __init__(self, inputs: int, outputs: int, expansion: int, *, stride: int) -> None:
        super().__init__()
        hidden, norm = inputs * expansion, nn.BatchNorm2d
        expand = [_convolution(inputs, hidden, 1, norm, nn.ReLU6)] if expansion > 1 else []
        depthwise = _convolution(hidden, hidden, 3, norm, nn.ReLU6, stride=stride, groups=hidden)
        self.conv = nn.Sequential(*expand, depthwise, nn.Conv2d(hidden, outputs, 1, bias=False), norm(outputs))
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.shortcut else y


class MobileNetV3Small(nn.Module):
    """Inverted residuals with squeeze and excitation, then the usual head of two linear layers.

    Args:
        classes: Number of classes.
        channels: Channels of an image.
        width: Multiplier of all channels.
        small: Whether to leave out the first two halvings, for images below 64x64.
    """

    def __init__(self, classes: int, channels: int = 3, *, width: float = 1.0, small: bool = False) -> None:
        super().__init__()
        strides, outputs = _Strides(small), rounded(16 * width)
        layers: list[nn.Module] = [_convolution(channels, outputs, 3, _norm, nn.Hardswish, stride=strides.take(2))]
        for kernel, expanded, block_channels, squeezes, hard, stride in V3_SMALL_BLOCKS:
            inputs, outputs = outputs, rounded(block_channels * width)
            activation = nn.Hardswish if hard else nn.ReLU
            hidden = rounded(expanded * width)
            step = strides.take(stride)
            layers.append(
                Bottleneck(inputs, hidden, outputs, kernel, activation=activation, squeezes=squeezes, stride=step)
            )
        last, head = 6 * outputs, rounded(1024 * width)
        self.features = nn.Sequential(*layers, _convolution(outputs, last, 1, _norm, nn.Hardswish))
        self.classifier = nn.Sequential(
            nn.Linear(last, head), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(head, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


class Bottleneck(nn.Module):
    """Inverted residual of MobileNetV3."""

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        kernel: int,
        *,
        activation: type[nn.Module],
        squeezes: bool,
        stride: int,
    ) -> None:
        super().__init__()
        expand = [_convolution(inputs, hidden, 1, _norm, activation)] if hidden != inputs else []
        depthwise = _convolution(hidden, hidden, kernel, _norm, activation, stride=stride, groups=hidden)
        squeeze = [SqueezeExcitation(hidden, rounded(hidden / 4))] if squeezes else []
        self.block = nn.Sequential(*expand, depthwise, *squeeze, _convolution(hidden, outputs, 1, _norm, nn.Identity))
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return x + y if self.shortcut else y


class SqueezeExcitation(nn.Module):
    """Channels scaled by what two pointwise convolutions make of their means."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.activation, self.gate = nn.ReLU(), nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        scale: Tensor = self.gate(self.fc2(self.activation(self.fc1(x.mean((2, 3), keepdim=True)))))
        return x * scale


class _Strides:
    """Strides of a model one after the other, of which the first two above 1 count as 1 where images are small."""

    def __init__(self, small: bool) -> None:
        self._left_out = 2 if small else 0

    def take(self, stride: int) -> int:
        """The next stride."""
        if stride == 1 or not self._left_out:
            return stride
        self._left_out -= 1
        return 1


_norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.01)


def _convolution(
    inputs: int,
    outputs: int,
    kernel: int,
    norm: type[nn.BatchNorm2d] | partial[nn.BatchNorm2d],
    activation: type[nn.Module],
    *,
    stride: int = 1,
    groups: int = 1,
) -> nn.Sequential:
    """Convolution without bias, BatchNorm and activation."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, norm(outputs), activation())
