"""Frobenius decay: λ W is added to the gradient of a composed weight W before it goes on to the factors.

So the factors decay as the weight that they make up would, as if λ/2 Σ ‖W‖² over the factored layers were part of the
loss, which is reported without it. Weight decay of the factors themselves, such as AdamW's, shrinks a weight that is a
product of several of them by more, and faster where they are large.

Source: Khodak, Tenenholtz, Mackey and Fusi, Initialization and Regularization of Factorized Neural Layers
(arXiv 2105.01029).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from export.gradients import Graph
from export.step.composed import ComposedWeight
from fedpara_edge.factors.compose import compose
from fedpara_edge.nn import FactoredLayer


def append_decay(graph: Graph, weights: Sequence[ComposedWeight], *, strength: float, share: str) -> dict[str, str]:
    """Append λ W of each weight; return its name, by the name of the weight in the graph.

    Args:
        graph: Graph that already has the forward pass.
        weights: Composed weights.
        strength: Strength λ.
        share: Name of the share of the batch that a micro-batch makes up.
    """
    factor = graph.op("Mul", share, graph.scalar(strength))
    values = [graph.moved.get(weight.values[0], weight.values[0]) for weight in weights]
    return {value: graph.op("Mul", value, factor) for value in values}


def decays_in_torch(model: torch.nn.Module, strength: float) -> dict[torch.Tensor, torch.Tensor]:
    """Gradient of λ/2 Σ ‖W‖² with respect to all trained factors of a model, in torch."""
    decays: dict[torch.Tensor, torch.Tensor] = {}
    for layer in model.modules():
        if not isinstance(layer, FactoredLayer) or layer.spec.kind == "dense":
            continue
        factors = layer.factors()
        trained = [factor for factor in factors.values() if factor.requires_grad]
        if trained:
            penalty = strength / 2 * compose(layer.spec, factors, torch.tanh).square().sum()
            decays |= dict(zip(trained, torch.autograd.grad(penalty, trained), strict=True))
    return decays
