"""Means of the updates of a small round, for tests: their bytes, and what was refused."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import small_round

from fedpara_edge.aggregation import Aggregation
from fedpara_edge.formats.weights import Weights, write_weights

UNIT = 2.0**-24
METRICS = {"learning_rate_sum": 0.25, "alpha": 0.1}
"""Metrics with which any algorithm takes an update."""


def written(folder: Path, result: Aggregation) -> bytes:
    path = folder / "result.safetensors"
    write_weights(path, result.weights)
    return path.read_bytes()


def codes(rejected: Iterable[Any]) -> dict[str, str]:
    return {update.path.name: update.code for update in rejected}


def constant(weights: Weights, value: float) -> dict[str, Any]:
    return {t.name: np.full(t.shape, value, np.float32) for t in weights.layout.shared}


def forge_value(folder: Path, weights: Weights, client: str, value: float, name: str = "head.weight") -> Path:
    change = small_round.random_tensors(weights.layout, 8, 0.1)
    change[name].reshape(-1)[-1] = value
    return small_round.forge(folder / f"{client}.update", weights, tensors=change, client=client)
