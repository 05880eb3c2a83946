"""Choice of the linear layers to contract, that is, to compute from the factors without composing the weight.

Cost of a training step in nanoseconds, for a layer [m, n] of rank R on B rows, with S the columns of
`fedpara_edge.factors.compose.contraction`:

    composed     mn + 12 mnR / f + 6 mnB / f            two products, three passes over W, three products with x
    contracted   (m + n) (S + 40 R) + 6 (m + n) S B / f  products by row and the sums that undo them, then thin products

f, in operations per nanosecond, is that of onnxruntime on one thread of an x86 server; other processors are slower at
both. `benchmarks/contraction.py` compares the model with measured steps. Since FedPara's R² is at least min(m, n) where
it attains full rank, mostly low-rank layers and small ranks gain.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fedpara_edge.factors.layout import LayerSpec
from fedpara_edge.nn import Linear

_OPERATIONS_IN_NS = 150
_SUM_OF_A_ROW_NS = 40


def step_cost(layer: LayerSpec, rows: int, *, contracted: bool) -> float:
    """Estimated time in ns that a training step spends on a linear layer.

    >>> layer = LayerSpec(name="fc", operator="linear", kind="fedpara", form="matrix", shape=(512, 512), rank=8)
    >>> step_cost(layer, 64, contracted=True) < step_cost(layer, 64, contracted=False)
    True
    """
    (m, n), rank = layer.matrix_shape, layer.rank
    pairs = 1 if layer.kind == "lowrank" else 2
    if not contracted:
        return m * n * (pairs - 1 + 6 * (pairs * rank + rows) / _OPERATIONS_IN_NS)
    columns = {"lowrank": rank, "fedpara": rank**2, "pfedpara": rank**2 + rank}[layer.kind]
    by_row = 0 if layer.kind == "lowrank" else columns + _SUM_OF_A_ROW_NS * rank
    return (m + n) * (by_row + 6 * columns * rows / _OPERATIONS_IN_NS)


def contract_layers(model: nn.Module, inputs: Sequence[torch.Tensor], batch_size: int) -> list[str]:
    """Contract the linear layers of a model for which that is cheaper.

    Args:
        model: Model that runs on `inputs`.
        inputs: Raw input batches [B, ...], from which the rows that a layer sees for each example are counted.
        batch_size: Number of examples in a training batch.

    Returns:
        Names of the contracted layers.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    rows: dict[str, int] = dict.fromkeys(layers, 0)

    def counting(name: str) -> Any:
        def count(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            rows[name] += inputs[0].numel() // layer.in_features

        return count

    trial = copy.deepcopy(model).eval()  # running statistics would take the example in
    for name in layers:
        trial.get_submodule(name).register_forward_pre_hook(counting(name))
    with torch.no_grad():
        trial(*inputs)
    for name, layer in layers.items():
        # A layer that is never called has its composed weight read by another, as the last one of attention has; what
        # is not trained is composed once.
        trained = any(factor.requires_grad for factor in layer.factors().values())
        if rows[name] and trained and layer.spec.kind not in ("dense", "update") and not layer.spec.tanh:
            seen = rows[name] * batch_size // len(inputs[0])
            costs = [step_cost(layer.spec, seen, contracted=contracted) for contracted in (False, True)]
            layer.contracted = costs[1] < costs[0]
    return [name for name, layer in layers.items() if layer.contracted]
