"""GroupNorm in place of BatchNorm, whose running statistics neither aggregate well nor train on every engine."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

MAX_GROUPS = 32


def group_count(channels: int) -> int:
    """Largest divisor of `channels` up to 32 that leaves at least two channels in a group.

    One channel per group would be instance normalization, which turns a 1x1 image into a constant.

    >>> [group_count(channels) for channels in (1, 7, 32, 64, 96, 512)]
    [1, 1, 16, 32, 32, 32]
    """
    return max(n for n in range(1, min(MAX_GROUPS, max(1, channels // 2)) + 1) if channels % n == 0)


def group_norm_like(batchnorm: _BatchNorm) -> nn.GroupNorm:
    """GroupNorm with the channels, eps and affine parameters of a BatchNorm; its running statistics are dropped.

    BatchNorm1d may see one value per channel, of which groups would leave only the sign: it gets a single group.
    """
    channels = batchnorm.num_features
    groups = 1 if isinstance(batchnorm, nn.BatchNorm1d) else group_count(channels)
    norm = nn.GroupNorm(groups, channels, eps=batchnorm.eps, affine=batchnorm.affine)
    if batchnorm.affine:
        norm.weight, norm.bias = batchnorm.weight, batchnorm.bias
    return norm.train(batchnorm.training)
