"""A model of two inputs and two outputs: a signal and the day of the week, to an activity and a load."""

import torch
from torch import nn


class Net(nn.Module):
    """Convolution over the signal, embedding of the day, and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.signal, self.day = nn.Conv1d(3, 32, 5, padding=2), nn.Embedding(7, 32)
        self.activity, self.load = nn.Linear(32, 5), nn.Linear(32, 1)

    def forward(self, signal: torch.Tensor, day: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs by name, for signals [B, 3, T] and days int64 [B]."""
        features = torch.relu(self.signal(signal)).mean(2) + self.day(day)
        return {"activity": self.activity(features), "load": self.load(features)}


def net() -> nn.Module:
    """The model, with random weights."""
    return Net()
