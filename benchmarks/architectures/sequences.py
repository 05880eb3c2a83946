"""Time series: forecasts of the next steps from a window [time] or [time, channels]."""

from __future__ import annotations

import torch
from torch import nn

from architectures.architecture import Applied, Architecture, Block, Positions, Residual, swap


class NBeats(nn.Module):
    """Stacked blocks that each explain part of the window and forecast from it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 60))
            for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        forecast = torch.zeros(())
        for number, block in enumerate(self.blocks):
            found = block(x)
            forecast = forecast + found[:, 48:]
            if number + 1 < len(self.blocks):
                x = x - found[:, :48]
        return forecast


def tcn() -> nn.Module:
    """Residual blocks of dilated causal convolutions."""

    def block(inputs: int, outputs: int, dilation: int) -> nn.Module:
        pad = nn.ConstantPad1d((2 * dilation, 0), 0.0)
        body = nn.Sequential(
            pad,
            nn.Conv1d(inputs, outputs, 3, dilation=dilation),
            nn.ReLU(),
            pad,
            nn.Conv1d(outputs, outputs, 3, dilation=dilation),
            nn.ReLU(),
        )
        return Residual(body, nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None)

    return nn.Sequential(
        Applied(swap), block(4, 24, 1), block(24, 24, 2), block(24, 24, 4), nn.Flatten(), nn.Linear(24 * 32, 8)
    )


class DLinear(nn.Module):
    """A moving average and the rest, each with a linear forecast for every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.average = nn.AvgPool1d(5, 1, 2, count_include_pad=False)
        self.trend, self.rest = nn.Linear(48, 12), nn.Linear(48, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(1, 2)
        trend = self.average(x)
        return (self.trend(trend) + self.rest(x - trend)).transpose(1, 2)


class PatchTST(nn.Module):
    """Windows normalized one by one, cut into patches, and a transformer for each channel on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(8, 32), Positions(6, 32))
        self.blocks = nn.Sequential(Block(32, 4), Block(32, 4))
        self.head = nn.Linear(6 * 32, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(1, keepdim=True)
        deviation = torch.sqrt(((x - mean) ** 2).mean(1, keepdim=True) + 1e-5)
        patches = ((x - mean) / deviation).transpose(1, 2).reshape(-1, 6, 8)
        forecast = self.head(self.blocks(self.embed(patches)).flatten(1)).reshape(-1, 3, 12).transpose(1, 2)
        return forecast * deviation + mean


def ts_mixer() -> nn.Module:
    """Linear maps over time and over channels in turn."""

    def block() -> nn.Module:
        time = nn.Sequential(nn.LayerNorm(4), Applied(swap), nn.Linear(32, 32), nn.ReLU(), Applied(swap))
        channels = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4))
        return nn.Sequential(Residual(time), Residual(channels))

    return nn.Sequential(block(), block(), Applied(swap), nn.Linear(32, 8), Applied(swap))


ARCHITECTURES = (
    Architecture(name="N-BEATS", make=NBeats, shape=(48,), loss="mse"),
    Architecture(name="TCN", make=tcn, shape=(32, 4), loss="mse"),
    Architecture(name="DLinear", make=DLinear, shape=(48, 3), loss="mse"),
    Architecture(name="PatchTST", make=PatchTST, shape=(48, 3), loss="mse"),
    Architecture(name="TSMixer", make=ts_mixer, shape=(32, 4), loss="mse"),
)
