"""Text: the next token at each position [B, tokens, positions], or a class of the whole."""

from __future__ import annotations

import torch
from torch import nn

from architectures.architecture import Applied, Architecture, Block, First, Positions, mean_over_time, swap

TOKENS, LENGTH = 40, 16


def recurrent_model(kind: type[nn.RNNBase]) -> nn.Module:
    """An embedding, a recurrent network, and logits of the next token."""
    recurrent = kind(24, 32, batch_first=True)
    return nn.Sequential(nn.Embedding(TOKENS, 24), First(recurrent), nn.Linear(32, TOKENS), Applied(swap))


def gpt() -> nn.Module:
    """Causal blocks."""
    return nn.Sequential(
        nn.Embedding(TOKENS, 32),
        Positions(LENGTH, 32),
        Block(32, 4, causal=True),
        Block(32, 4, causal=True),
        nn.LayerNorm(32),
        nn.Linear(32, TOKENS, bias=False),
        Applied(swap),
    )


def bert() -> nn.Module:
    """Torch's own encoder, the normalization last, and the first position."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, activation="gelu", batch_first=True)
    return nn.Sequential(
        nn.Embedding(TOKENS, 32),
        Positions(LENGTH, 32),
        nn.LayerNorm(32),
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        Applied(lambda x: x[:, 0]),
        nn.Linear(32, 32),
        nn.Tanh(),
        nn.Linear(32, 4),
    )


class TextCNN(nn.Module):
    """Convolutions of several lengths over the words, each with its maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 24)
        self.convolutions = nn.ModuleList(nn.Conv1d(24, 16, length) for length in (2, 3, 4))
        self.head = nn.Linear(48, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).transpose(1, 2)
        return self.head(torch.cat([torch.relu(each(x)).amax(2) for each in self.convolutions], 1))


def bag_of_words() -> nn.Module:
    """The mean of the words' embeddings."""
    return nn.Sequential(nn.Embedding(TOKENS, 24), Applied(mean_over_time), nn.Linear(24, 4))


def bidirectional() -> nn.Module:
    """A class for every word from a recurrent network in both directions."""
    recurrent = nn.GRU(24, 16, batch_first=True, bidirectional=True)
    return nn.Sequential(nn.Embedding(TOKENS, 24), First(recurrent), nn.Linear(32, 5), Applied(swap))


ARCHITECTURES = (
    Architecture(name="GRU language model", make=lambda: recurrent_model(nn.GRU), shape=(LENGTH,), tokens=TOKENS),
    Architecture(name="LSTM language model", make=lambda: recurrent_model(nn.LSTM), shape=(LENGTH,), tokens=TOKENS),
    Architecture(name="GPT", make=gpt, shape=(LENGTH,), tokens=TOKENS),
    Architecture(name="BERT", make=bert, shape=(LENGTH,), tokens=TOKENS),
    Architecture(name="TextCNN", make=TextCNN, shape=(LENGTH,), tokens=TOKENS),
    Architecture(name="bag of words", make=bag_of_words, shape=(LENGTH,), tokens=TOKENS),
    Architecture(name="bidirectional tagger", make=bidirectional, shape=(LENGTH,), tokens=TOKENS),
)
