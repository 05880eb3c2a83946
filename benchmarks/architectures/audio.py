"""Audio: keyword spotting on spectrograms [1, frequencies, frames] or features [frequencies, frames], and waveforms."""

from __future__ import annotations

import torch
from torch import nn

from architectures.architecture import (
    Applied,
    Architecture,
    Block,
    First,
    Positions,
    Residual,
    last,
    mean_over_time,
    swap,
    two_convolutions,
)


def ds_cnn() -> nn.Module:
    """A convolution, then depthwise separable ones."""

    def separable(width: int) -> list[nn.Module]:
        return [
            nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]

    first = [nn.Conv2d(1, 32, (10, 4), (2, 2), (5, 1), bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(
        *first, *separable(32), *separable(32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 12)
    )


def tc_resnet() -> nn.Module:
    """Residual convolutions over time with the frequencies as channels."""

    def block(inputs: int, outputs: int) -> nn.Module:
        body = two_convolutions(inputs, outputs, 9)
        shortcut = nn.Sequential(nn.Conv1d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm1d(outputs), nn.ReLU())
        return nn.Sequential(Residual(body, shortcut), nn.ReLU())

    return nn.Sequential(
        nn.Conv1d(40, 16, 3, 1, 1, bias=False),
        block(16, 24),
        block(24, 32),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(32, 12),
    )


def crnn() -> nn.Module:
    """A convolution over frequency and time, then a GRU over time."""
    return nn.Sequential(
        nn.Conv2d(1, 16, (20, 5), (8, 2)),
        nn.ReLU(),
        nn.Flatten(1, 2),
        Applied(swap),
        First(nn.GRU(48, 32, batch_first=True)),
        Applied(last),
        nn.Linear(32, 12),
    )


def whisper_encoder() -> nn.Module:
    """Two convolutions over time, positions, and transformer blocks."""
    return nn.Sequential(
        nn.Conv1d(40, 32, 3, padding=1),
        nn.GELU(),
        nn.Conv1d(32, 32, 3, 2, 1),
        nn.GELU(),
        Applied(swap),
        Positions(16, 32),
        Block(32, 2),
        Block(32, 2),
        nn.LayerNorm(32),
        Applied(mean_over_time),
        nn.Linear(32, 12),
    )


def wav2vec() -> nn.Module:
    """Strided convolutions over a waveform, the first with a GroupNorm of one channel a group, and a transformer."""
    return nn.Sequential(
        nn.Conv1d(1, 32, 10, 5, bias=False),
        nn.GroupNorm(32, 32),
        nn.GELU(),
        nn.Conv1d(32, 32, 3, 2, bias=False),
        nn.GELU(),
        nn.Conv1d(32, 32, 3, 2, bias=False),
        nn.GELU(),
        Applied(swap),
        nn.LayerNorm(32),
        Block(32, 4),
        Applied(mean_over_time),
        nn.Linear(32, 8),
    )


class GatedWaves(nn.Module):
    """Dilated causal convolutions with gates, as in WaveNet, and skip connections that are summed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv1d(1, 16, 1), nn.Conv1d(16, 8, 1)
        self.gates = nn.ModuleList(nn.Conv1d(16, 32, 2, dilation=2**n) for n in range(4))
        self.mixes = nn.ModuleList(nn.Conv1d(16, 16, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, skipped = self.first(x), torch.zeros(())
        for n, (gate, mix) in enumerate(zip(self.gates, self.mixes, strict=True)):
            value, opening = gate(nn.functional.pad(h, (2**n, 0))).chunk(2, 1)
            z = mix(torch.tanh(value) * torch.sigmoid(opening))
            h, skipped = h + z, skipped + z
        return self.head(torch.relu(skipped))


ARCHITECTURES = (
    Architecture(name="DS-CNN", make=ds_cnn, shape=(1, 40, 20), batchnorm="group"),
    Architecture(name="TC-ResNet", make=tc_resnet, shape=(40, 32), batchnorm="group"),
    Architecture(name="CRNN", make=crnn, shape=(1, 40, 32)),
    Architecture(name="Whisper encoder", make=whisper_encoder, shape=(40, 32)),
    Architecture(name="wav2vec", make=wav2vec, shape=(1, 400)),
    Architecture(name="WaveNet", make=GatedWaves, shape=(1, 64)),
)
