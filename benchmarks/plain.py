"""Local training in plain torch, as everybody writes it, for the federations that ours are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


def train_epoch(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    lr: float,
    batch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> float:
    """Train a classifier of grey images for one epoch by AdamW; the mean loss of its batches.

    Args:
        model: The model, which takes float32 [N, 1, 28, 28].
        x: Images, uint8 [N, ...] of 784 pixels each.
        y: Classes, int64 [N].
        lr: Learning rate.
        batch_size: Examples in a batch.
        mean: Mean of the pixels in [0, 1].
        std: Their standard deviation.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    for rows in torch.randperm(len(y)).split(batch_size):
        images = (x[rows].reshape(len(rows), 1, 28, 28).float() / 255 - torch.tensor(mean)) / torch.tensor(std)
        optimizer.zero_grad()
        loss = cross_entropy(model(images), y[rows])
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return sum(losses) / len(losses)
