"""A net for spoken commands that convolves over time alone, mel bands as channels (TC-ResNet, Choi et al. 2019)."""

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Two convolutions over nine steps, the first of stride 2, beside one of a single step.

    Args:
        inputs: Channels of the input [N, C, T].
        outputs: Channels of the output [N, outputs, T // 2], rounded up.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv1d(inputs, outputs, 9, stride=2, padding=4, bias=False),
            nn.GroupNorm(8, outputs),
            nn.ReLU(),
            nn.Conv1d(outputs, outputs, 9, padding=4, bias=False),
            nn.GroupNorm(8, outputs),
        )
        self.shortcut = nn.Sequential(nn.Conv1d(inputs, outputs, 1, stride=2, bias=False), nn.GroupNorm(8, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.path(x) + self.shortcut(x))


def net() -> nn.Module:
    """Net for log-mel spectrograms [40, 51] of forty words."""
    return nn.Sequential(
        nn.Conv1d(40, 48, 5, stride=2, padding=2, bias=False),
        nn.GroupNorm(8, 48),
        nn.ReLU(),
        Residual(48, 64),
        Residual(64, 96),
        Residual(96, 128),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(128, 40),
    )
