"""The aggregation gap: the distance of the mean of the factors from the mean of the weights they compose to.

The server averages factors, as in the paper, but what a device trained is the weight W they compose to, and

    gap = ||W(mean of factors) - mean of W||_F / ||mean of W - W(base)||_F

is of second order in the deviations of the devices from each other: 0 if all moved alike or if only one factor moved,
6 to 34 % in the independent drifts that we measured. No published work removes it for Hadamard products.

To compose every weight of every device would cost far more than reading the updates, so the gap is estimated from a
sample of the entries of W (`weightsample`), whose norms are scaled up to the layer. A layer no larger than its sample
is compared exactly. Where all layers would need more than `UPDATE_ENTRIES` factor entries of an update, or
`ALL_ENTRIES` of all updates, some are left out, evenly, which bounds the cost; at least one stays, and as many as
`LEAST_ENTRIES` of an update allow. Of pFedPara only W1 is compared: W2 never leaves the devices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.aggregation.stream import EntryWatcher
from fedpara_edge.aggregation.weightsample import LayerSample, evenly, sample_layer
from fedpara_edge.codecs.codec import in_order
from fedpara_edge.factors.layout import Layout

UPDATE_ENTRIES = 1 << 17
ALL_ENTRIES = 1 << 22
LEAST_ENTRIES = 1 << 15


@dataclass(frozen=True, kw_only=True)
class LayerGap:
    """The gap of one layer.

    Args:
        layer: Name of the layer.
        relative: Gap over the mean movement; infinite if the mean of the weights did not move but the mean of the
            factors did, or if the weights are beyond float64.
        entries: Number of composed weights that were compared.
        exact: Whether these are all of the layer.
    """

    layer: str
    relative: float
    entries: int
    exact: bool


@dataclass(frozen=True, kw_only=True)
class Gap:
    """The gap of a model.

    Args:
        relative: Gap over the mean movement, of all compared layers together.
        layers: Gap of each compared layer.
    """

    relative: float
    layers: tuple[LayerGap, ...]

    @property
    def entries(self) -> int:
        """Number of composed weights of each update that were compared."""
        return sum(layer.entries for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`; an infinite gap is null."""
        return {
            "relative": finite(self.relative),
            "entries": self.entries,
            "layers": [{**vars(layer), "relative": finite(layer.relative)} for layer in self.layers],
        }


class GapEstimator(EntryWatcher):
    """A `stream.Watcher` that gathers the gap while updates stream by.

    Args:
        layout: Layout of the model.
        base: Shared tensors that the updates change, by name, float32.
        updates: Number of updates to come.
        update_entries: Most factor entries to compare of an update.
        all_entries: Most factor entries to compare of all updates.
        least_entries: Factor entries of an update to compare however many updates there are.
    """

    def __init__(
        self,
        layout: Layout,
        base: Mapping[str, NDArray[np.float32]],
        *,
        updates: int,
        update_entries: int = UPDATE_ENTRIES,
        all_entries: int = ALL_ENTRIES,
        least_entries: int = LEAST_ENTRIES,
    ) -> None:
        samples = [sample for layer in layout.layers if (sample := sample_layer(layout, layer))]
        budget = max(min(update_entries, all_entries // max(updates, 1)), least_entries)
        self._layers = _affordable(samples, budget)
        parts = {part.name: part for sample in self._layers for part in sample.parts.values()}
        offset, self._columns, positions = 0, dict[str, slice](), [np.empty(0, np.int64)]
        for tensor in in_order(layout.shared):
            if tensor.name in parts:
                first = sum(map(len, positions))
                positions.append(offset + parts[tensor.name].positions)
                self._columns[tensor.name] = slice(first, first + len(positions[-1]))
            offset += tensor.size
        # Ascending, as both the tensors and the positions within each are: a piece of the change is a range of them.
        super().__init__(np.concatenate(positions))
        self._base = np.empty(len(self._positions))
        for name, columns in self._columns.items():
            self._base[columns] = base[name].reshape(-1)[parts[name].positions]
        # Differences from the weights of the base, so that a layer that nobody moved has moved by exactly nothing.
        self._base_weights = [self._compose(sample, np.zeros((1, len(self._positions))))[0] for sample in self._layers]
        self._mean_moves = [np.zeros(sample.shape) for sample in self._layers]

    def finish_block(self, shares: NDArray[np.float64], thread: int, threads: int) -> None:
        """Compose the samples of a block of updates, every `threads`-th layer, and add them up by `shares`."""
        changes = self._changes[: len(shares)]
        with np.errstate(over="ignore", invalid="ignore"):
            for number in range(thread, len(self._layers), threads):
                moves = self._compose(self._layers[number], changes) - self._base_weights[number]
                self._mean_moves[number] += np.einsum("u,u...->...", shares, moves)

    def result(self, mean_change: NDArray[np.float64]) -> Gap | None:
        """The gap of all updates so far; None if no layer has factors that travel.

        Args:
            mean_change: Mean of their flat changes, float64 [entries].
        """
        if not self._layers:
            return None
        sampled = mean_change[None, self._positions]
        errors, moves, layers = [], [], []
        for sample, base, move in zip(self._layers, self._base_weights, self._mean_moves, strict=True):
            all_entries = sample.layer.dense_parameters
            with np.errstate(over="ignore", invalid="ignore"):
                move_of_mean = self._compose(sample, sampled)[0] - base
                errors.append(float(np.sum((move_of_mean - move) ** 2)) * all_entries / move.size)
                moves.append(float(np.sum(move**2)) * all_entries / move.size)
            layers.append(
                LayerGap(
                    layer=sample.layer.name,
                    relative=relative_gap(errors[-1], moves[-1]),
                    entries=move.size,
                    exact=move.size == all_entries,
                )
            )
        return Gap(relative=relative_gap(sum(errors), sum(moves)), layers=tuple(layers))

    def _compose(self, sample: LayerSample, changes: NDArray[Any]) -> NDArray[np.float64]:
        factors = {}
        for key, part in sample.parts.items():
            columns = self._columns[part.name]
            factors[key] = (self._base[columns] + changes[:, columns]).reshape(-1, *part.shape)
        return sample.compose(factors)


def _affordable(samples: Sequence[LayerSample], entries: int) -> Sequence[LayerSample]:
    for taken in range(len(samples), 1, -1):
        chosen = [samples[number] for number in evenly(len(samples), taken)]
        if sum(sample.factor_entries for sample in chosen) <= entries:
            return chosen
    return [samples[number] for number in evenly(len(samples), 1)]


def relative_gap(error: float, moved: float) -> float:
    """The gap of a squared error and a squared movement: the root of their ratio; 0 without an error."""
    if error == 0:
        return 0.0
    ratio = error / moved if moved > 0 else math.inf
    return math.sqrt(ratio) if math.isfinite(ratio) else math.inf


def finite(value: float) -> float | None:
    """The number as JSON has it: None if it is infinite."""
    return value if math.isfinite(value) else None
