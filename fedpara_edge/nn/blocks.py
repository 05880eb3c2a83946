"""Building blocks of the zoo's models for which torch has no module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpara_edge.nn.groupnorm import group_count

STEPS_IN_A_PATCH = 5


class NextCharacter(nn.Module):
    """LSTM from characters [N, T] to logits [N, classes, T] of the next character at every position."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, 8)
        self.lstm = nn.LSTM(8, 256, num_layers=2, batch_first=True)
        self.head = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.lstm(self.embedding(x))
        logits: Tensor = self.head(outputs)
        return logits.transpose(1, 2)


class SensorTransformer(nn.Module):
    """Transformer encoder from windows [N, T, C] to logits [N, classes]."""

    def __init__(self, classes: int, steps: int, channels: int, width: int = 128, blocks: int = 2) -> None:
        super().__init__()
        self.patch = nn.Linear(STEPS_IN_A_PATCH * channels, width)
        self.positions = nn.Parameter(0.02 * torch.randn(steps // STEPS_IN_A_PATCH, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads=4, hidden=2 * width) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x.reshape(x.shape[0], len(self.positions), -1)) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(dim=1))
        return logits


class TransformerBlock(nn.Module):
    """Attention and a feed-forward layer, each with normalization before it and a shortcut around it."""

    def __init__(self, width: int, *, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        # No bias: attention does not depend on that of the keys, whose gradient is rounding that AdamW would magnify.
        self.attention = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width)
        self.inner, self.outer = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        count, tokens, width = x.shape
        parts = self.attention(self.norm1(x)).reshape(count, tokens, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # each [N, heads, tokens, width / heads]
        mixed = F.scaled_dot_product_attention(query, key, value)
        x = x + self.output(mixed.transpose(1, 2).reshape(count, tokens, width))
        inner: Tensor = self.outer(F.gelu(self.inner(self.norm2(x))))
        return x + inner


class SpatialMean(nn.Module):
    """Mean over the image, from [N, C, H, W] to [N, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with GroupNorm and a shortcut around them, a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(group_count(outputs), outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(group_count(outputs), outputs)
        # Near the identity at first: with 1, the loss jumps at a learning rate of 0.1.
        nn.init.constant_(self.norm2.weight, 0.25)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            project = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(project, nn.GroupNorm(group_count(outputs), outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))
