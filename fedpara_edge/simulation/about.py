"""What the metrics say of a federation besides its clients, whoever runs it."""

from __future__ import annotations

from typing import Any

from fedpara_edge.factors.layout import Layout
from fedpara_edge.simulation.plan.plan import Arm


def about(arm: Arm, layout: Layout) -> dict[str, Any]:
    """Fields of an event `arm` (`metrics`) that the arm and its model decide.

    Args:
        arm: Arm of a plan.
        layout: Layout of its model.
    """
    shared = 0 if arm.local_only else layout.shared_parameters
    trained = sum(tensor.size for tensor in layout.with_role("shared", "personal"))
    return {
        "model": arm.model.title,
        "kind": arm.model.kind,
        "gamma": None if arm.model.kind == "dense" else arm.model.gamma,
        "algorithm": arm.algorithm,
        "weighting": None if arm.local_only else arm.aggregate.effective_weighting,
        "codec": arm.train.codec,
        "downlink_codec": arm.aggregate.downlink_codec or "float32",
        "shared_parameters": shared,
        "personal_parameters": trained - shared,
        "dense_parameters": layout.dense_parameters,
        "full_ranks": {layer.name: min(layer.matrix_shape) for layer in layout.layers if layer.kind != "dense"},
        "local_only": arm.local_only,
    }
