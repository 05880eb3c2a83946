"""Recurrent layers beside torch's, and a model that labels every step of a sequence."""

import torch
from torch import nn

from fedpara_edge.nn import GRU, LSTM
from fedpara_edge.nn.recurrent import FactoredRecurrent

PAIRS: dict[str, tuple[type[FactoredRecurrent], type[nn.LSTM | nn.GRU]]] = {
    "lstm": (LSTM, nn.LSTM),
    "gru": (GRU, nn.GRU),
}


class Tagger(nn.Module):
    """[N, T, 3] to logits [N, 5, T], of a label at every step."""

    def __init__(self, memory: nn.Module, features: int) -> None:
        super().__init__()
        self.memory = memory
        self.head = nn.Linear(features, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.memory(x)[0]).transpose(1, 2)
