"""Inner products of the changes of all updates: of the tensors themselves, or of the weights they compose to.

Factors are not unique: X -> c X and Y -> Y / c leave X Yᵀ as it is. So a distance between factors says little about one
between weights: the same step of the weight takes a short way in a factor whose partner is large, and an enormous one
for nothing but another scale. In the space of the composed change, W(base + change) - W(base), only the weight counts.
Running statistics count in neither.

In float64, from changes that are already differences from the base. The composed change is made a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.aggregation.columns import LANES
from fedpara_edge.codecs.codec import in_order
from fedpara_edge.codecs.decoding import decode_range
from fedpara_edge.factors.compose import compose, factor_shapes, travelling
from fedpara_edge.factors.layout import STATISTICS, LayerSpec, Layout
from fedpara_edge.formats.update import Update
from fedpara_edge.formats.weights import Weights

TILE = 1 << 12
ROWS_ENTRIES = 1 << 23
"""Most entries of the composed changes of all updates at a time."""


class GramOfColumns:
    """Inner products of the changes, added up by columns (`columns.Work`).

    Args:
        layout: Layout of the model.
        updates: Number of updates.
        without: Names of tensors to leave out besides running statistics.
    """

    def __init__(self, layout: Layout, updates: int, without: frozenset[str] = frozenset()) -> None:
        self._sums = np.zeros((LANES, updates, updates))
        tensors = in_order(layout.shared)
        left_out = [tensor.part in STATISTICS or tensor.name in without for tensor in tensors]
        self._ends = np.cumsum([tensor.size for tensor in tensors], dtype=np.int64)
        self._left_out = np.array(left_out, bool)

    def __call__(self, lane: int, start: int, rows: NDArray[np.float32]) -> None:
        """Add the products of a piece."""
        counts = self._counts(start, start + rows.shape[1])
        for first in range(0, rows.shape[1], TILE):
            own = counts[first : first + TILE]
            if own.any():
                tile = rows[:, first : first + TILE].astype(np.float64)
                if not own.all():
                    tile = tile[:, own]
                self._sums[lane] += tile @ tile.T

    def result(self) -> NDArray[np.float64]:
        """The products, float64 [updates, updates]."""
        return np.asarray(self._sums.sum(axis=0))

    def _counts(self, start: int, stop: int) -> NDArray[np.bool_]:
        first, last = np.searchsorted(self._ends, (start, stop - 1), side="right")
        ends = np.minimum(self._ends[first : last + 1], stop)
        return np.repeat(~self._left_out[first : last + 1], np.diff(ends, prepend=start))


def factor_names(layout: Layout) -> frozenset[str]:
    """Names of the factors that compose to weights."""
    return frozenset(
        layout.parts(layer)[part].name
        for layer in layout.layers
        if (seen := travelling(layout, layer))
        for part in factor_shapes(seen)
    )


def gram_of_weights(updates: Sequence[Update], weights: Weights) -> NDArray[np.float64]:
    """Inner products of the changes of the composed weights, float64 [updates, updates].

    Args:
        updates: Closed updates, all of them good.
        weights: Weights that they change.

    Raises:
        InvalidUpdateError: An update is gone or was changed since it was first read.
    """
    gram = np.zeros((len(updates), len(updates)))
    for layer in weights.layout.layers:
        if (seen := travelling(weights.layout, layer)) is not None:
            gram += _gram_of_layer(updates, weights, seen)
    return gram


def _gram_of_layer(updates: Sequence[Update], weights: Weights, layer: LayerSpec) -> NDArray[np.float64]:
    parts, offsets = weights.layout.parts(layer), _offsets(weights.layout)
    names = {part: parts[part] for part in factor_shapes(layer)}
    base = {part: np.asarray(weights.tensors[tensor.name], np.float64) for part, tensor in names.items()}
    width = int(np.prod(layer.shape[1:]))
    step = max(1, ROWS_ENTRIES // (width * len(updates)))
    gram = np.zeros((len(updates), len(updates)))
    for first in range(0, layer.shape[0], step):
        rows = slice(first, min(first + step, layer.shape[0]))
        before = _compose_rows(layer, base, rows)
        moves = np.empty((len(updates), before.size), np.float32)
        for number, update in enumerate(updates):
            update.reopen()
            try:
                moved = {
                    part: base[part]
                    + decode_range(update.decoder, offsets[tensor.name], tensor.size, weights.layout.shared_parameters)
                    .astype(np.float64)
                    .reshape(tensor.shape)
                    for part, tensor in names.items()
                }
            finally:
                update.close()
            with np.errstate(over="ignore", invalid="ignore"):
                moves[number] = _compose_rows(layer, moved, rows) - before
        moves = np.nan_to_num(moves, nan=_LARGEST, posinf=_LARGEST, neginf=-_LARGEST)
        for start in range(0, moves.shape[1], TILE):
            tile = moves[:, start : start + TILE].astype(np.float64)
            gram += tile @ tile.T
    return gram


_LARGEST = 1e30
"""What stands for weights that are not finite: far from all others."""


def _compose_rows(layer: LayerSpec, factors: Mapping[str, NDArray[np.float64]], rows: slice) -> NDArray[np.float64]:
    some = {part: factor[rows] if part.startswith("x") else factor for part, factor in factors.items()}
    part = replace(layer, shape=(rows.stop - rows.start, *layer.shape[1:]))
    return np.asarray(compose(part, some, np.tanh)).reshape(-1)


def _offsets(layout: Layout) -> dict[str, int]:
    """Numbers of the tensors' first entries in a flat change."""
    offsets, offset = {}, 0
    for tensor in in_order(layout.shared):
        offsets[tensor.name] = offset
        offset += tensor.size
    return offsets
