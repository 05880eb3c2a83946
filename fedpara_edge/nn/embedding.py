"""`Embedding` with a factored table, of which only the rows that are looked up need be composed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedpara_edge.factors.compose import ROWWISE, compose_rows
from fedpara_edge.factors.factorization import Init
from fedpara_edge.factors.layout import LayerSpec
from fedpara_edge.nn.layers import FactoredLayer

COMPOSED_ROWS = 2048
"""Largest number of rows of a table that is composed as a whole, which pays where most rows are looked up."""


class Embedding(FactoredLayer):
    """`torch.nn.Embedding` with the table [V, D] composed of factors, row i = (x1ᵢ Y1ᵀ) ⊙ (x2ᵢ Y2ᵀ).

    A table of up to `COMPOSED_ROWS` rows is composed; of a larger one, the rows that are looked up.

    Args:
        spec: Spec of the table.
        padding_idx: Row that is zero and has no gradient; None for no such row.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        init: Initialization of the factors.
        initial_std: Rms of a composed table, 1 as in torch.

    Shapes: x int64 [...] with values from 0 to V - 1, result [..., D].

    >>> spec = LayerSpec(name="e", operator="linear", kind="fedpara", form="matrix", shape=(9000, 64), rank=8)
    >>> Embedding(spec)(torch.tensor([[3, 8999]])).shape
    torch.Size([1, 2, 64])
    """

    def __init__(
        self,
        spec: LayerSpec,
        *,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        init: Init = "composed",
        initial_std: float = 1.0,
    ) -> None:
        super().__init__(spec, bias=False, device=device, dtype=dtype, init=init, initial_std=initial_std)
        self.num_embeddings, self.embedding_dim = spec.shape
        self.padding_idx = padding_idx

    def forward(self, x: Tensor) -> Tensor:
        """Rows of the table."""
        rows: Tensor
        if self.num_embeddings <= COMPOSED_ROWS:
            rows = F.embedding(x, self.compose())
        else:
            looked_up = {
                part: F.embedding(x, factor) if part in ROWWISE else factor for part, factor in self.parts().items()
            }
            rows = compose_rows(self.spec, looked_up, torch.tanh)
        if self.padding_idx is None:
            return rows
        return rows * (x != self.padding_idx).unsqueeze(-1).to(rows.dtype)
