"""Models and a loss for the engine `torch`, as recipes name them: a file and a factory."""

import torch
from torch import nn
from torch.nn import functional as F


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(2, 12), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(108, 5)
    )


def normalized() -> nn.Module:
    model = plain()
    model[1] = nn.BatchNorm2d(12)
    return model


def normalized_by_batches() -> nn.Module:
    model = plain()
    model[1] = nn.BatchNorm2d(12, track_running_stats=False)
    return model


def dropping() -> nn.Module:
    model = plain()
    model[4] = nn.Sequential(nn.Dropout(0.4), nn.Flatten())
    return model


class Drawing(nn.Module):
    """Noise in training, as of drop path, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.first(x))
        if self.training:
            y = y * torch.rand(y.shape[0], 1).ge(0.3).float() / 0.7 + 0.1 * torch.randn_like(y)
        return self.last(y)


class Squeezed(nn.Module):
    """A mean over images, whose axes are squeezed away, the batch's too if it has one row."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.conv(x)).mean((2, 3), keepdim=True).squeeze())


class Centred(nn.Module):
    """Rows without the mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x - x.mean(0))


class TwoHeads(nn.Module):
    """Age and kind."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.age, self.kind = nn.Linear(12, 12), nn.Linear(12, 1), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = torch.tanh(self.body(x))
        return {"age": self.age(y), "kind": self.kind(y)}


def focal(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    log_p = F.log_softmax(outputs, 1).gather(1, labels[:, None])[:, 0]
    return -((1 - log_p.exp()) ** 2 * log_p).mean()
