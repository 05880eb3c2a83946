"""What the metrics say of a federation besides its clients, whoever runs it."""

from __future__ import annotations

from typing import Any

from device_runtime.config import TrainCall
from fedpara_edge.aggregation.config import AggregateConfig
from fedpara_edge.factors.layout import Layout
from fedpara_edge.formats.bundle import Manifest
from fedpara_edge.simulation.plan.plan import Arm, algorithm_of


def about(arm: Arm, layout: Layout) -> dict[str, Any]:
    """Fields of an event `arm` (`metrics`) that the arm and its model decide.

    Args:
        arm: Arm of a plan.
        layout: Layout of its model.
    """
    return {
        "model": arm.model.title,
        "kind": arm.model.kind,
        "gamma": None if arm.model.kind == "dense" else arm.model.gamma,
        "algorithm": arm.algorithm,
        "weighting": None if arm.local_only else arm.aggregate.effective_weighting,
        "codec": arm.train.codec,
        "downlink_codec": arm.aggregate.downlink_codec or "float32",
        **_sizes(layout, local_only=arm.local_only),
    }


def about_bundle(manifest: Manifest, train: TrainCall, aggregate: AggregateConfig) -> dict[str, Any]:
    """The same fields of a federation without a plan, by its bundle and its options; γ is not known.

    Args:
        manifest: Manifest of the bundle.
        train: Options of the devices' training.
        aggregate: Aggregation of their updates.
    """
    kinds = {layer.kind for layer in manifest.layout.layers} - {"dense"} or {"dense"}
    return {
        "model": manifest.model,
        "kind": " and ".join(sorted(kinds)),
        "gamma": None,
        "algorithm": algorithm_of(train.client_algorithm, aggregate.server_algorithm),
        "weighting": aggregate.effective_weighting,
        "codec": train.codec,
        "downlink_codec": aggregate.downlink_codec or "float32",
        **_sizes(manifest.layout, local_only=False),
    }


def _sizes(layout: Layout, *, local_only: bool) -> dict[str, Any]:
    shared = 0 if local_only else layout.shared_parameters
    trained = sum(tensor.size for tensor in layout.with_role("shared", "personal"))
    return {
        "shared_parameters": shared,
        "personal_parameters": trained - shared,
        "dense_parameters": layout.dense_parameters,
        "full_ranks": {layer.name: min(layer.matrix_shape) for layer in layout.layers if layer.kind != "dense"},
        "local_only": local_only,
    }
