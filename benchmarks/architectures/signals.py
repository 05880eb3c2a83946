"""Signals of sensors: windows of motion [channels, time] or [time, channels], and electrocardiograms."""

from __future__ import annotations

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


def motion_cnn() -> nn.Module:
    """Convolutions over time with pooling."""
    return nn.Sequential(
        nn.Conv1d(9, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Flatten(),
        nn.Linear(64 * 16, 64),
        nn.ReLU(),
        nn.Linear(64, 6),
    )


def motion_lstm() -> nn.Module:
    """Two layers of LSTM, and the last position."""
    return nn.Sequential(First(nn.LSTM(9, 32, 2, batch_first=True)), Applied(last), nn.Linear(32, 6))


def deep_conv_lstm() -> nn.Module:
    """Convolutions over time, then an LSTM."""
    return nn.Sequential(
        nn.Conv1d(9, 32, 5),
        nn.ReLU(),
        nn.Conv1d(32, 32, 5),
        nn.ReLU(),
        Applied(swap),
        First(nn.LSTM(32, 32, batch_first=True)),
        Applied(last),
        nn.Linear(32, 6),
    )


def motion_transformer() -> nn.Module:
    """A linear map, positions, blocks, and the mean over time."""
    return nn.Sequential(
        nn.Linear(9, 32), Positions(32, 32), Block(32, 4), Block(32, 4), Applied(mean_over_time), nn.Linear(32, 6)
    )


def heart_resnet() -> nn.Module:
    """Residual convolutions of a long kernel over one lead."""

    def block(inputs: int, outputs: int) -> nn.Module:
        body = two_convolutions(inputs, outputs, 17)
        return nn.Sequential(Residual(body, nn.Conv1d(inputs, outputs, 1, 2, bias=False)), nn.ReLU())

    return nn.Sequential(
        nn.Conv1d(1, 16, 17, 1, 8),
        block(16, 24),
        block(24, 32),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


def instance_normalized() -> nn.Module:
    """Convolutions whose biases an InstanceNorm takes away again."""
    return nn.Sequential(
        nn.Conv1d(6, 32, 5),
        nn.InstanceNorm1d(32),
        nn.ReLU(),
        nn.Conv1d(32, 32, 5, 2),
        nn.InstanceNorm1d(32, affine=True),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


ARCHITECTURES = (
    Architecture(name="HAR CNN", make=motion_cnn, shape=(9, 64)),
    Architecture(name="HAR LSTM", make=motion_lstm, shape=(20, 9)),
    Architecture(name="DeepConvLSTM", make=deep_conv_lstm, shape=(9, 24)),
    Architecture(name="HAR transformer", make=motion_transformer, shape=(32, 9)),
    Architecture(name="ECG ResNet", make=heart_resnet, shape=(1, 128), batchnorm="group"),
    Architecture(name="InstanceNorm CNN", make=instance_normalized, shape=(6, 128)),
)
