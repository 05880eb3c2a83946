"""Addition of a change to the weights: in float64, rounded to float32 once, and never to infinity.

The mean is a convex combination of changes, so base + mean can leave float32 only if base + change of some update does.
That update is refused, and not one that happened to be read with it. What a server algorithm keeps may ask for smaller
changes (`ServerAlgorithm.largest_change`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.aggregation.effort import USUAL, Effort
from fedpara_edge.codecs.codec import chunks, flatten, name_at, not_finite, unflatten
from fedpara_edge.errors import FedparaError, InvalidUpdateError, WrongBundleError
from fedpara_edge.formats.update import Update
from fedpara_edge.formats.weights import Weights

_LARGEST = np.finfo(np.float32).max


def add_change(
    weights: Weights, change: NDArray[np.float64], *, effort: Effort = USUAL
) -> dict[str, NDArray[np.float32]]:
    """The sum of weights and a flat change, by tensor; infinite where it is too large.

    Args:
        weights: Weights that it changes.
        change: Change of all of them, float64 [entries].
        effort: Division of the work.
    """
    flat, base = np.empty(change.shape, np.float32), weights.tensors
    moved, old = unflatten(weights.flat, flat), unflatten(weights.flat, change)

    def add(name: str) -> None:
        with np.errstate(over="ignore"):
            np.add(base[name], old[name], out=moved[name], dtype=np.float64, casting="same_kind")

    effort.each(add, moved)
    return {name: moved[name] for name in base if name in moved}


def limit(tensors: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """The tensors with the largest float32 in place of infinity, to which only rounding led."""
    return {name: np.clip(tensor, -_LARGEST, _LARGEST) for name, tensor in tensors.items()}


def find_overflowing(updates: Sequence[Update], weights: Weights, largest: Sequence[float]) -> dict[int, FedparaError]:
    """The errors of the updates whose own change leaves float32 when it is added to the weights, by their number.

    Every update is read again, which only happens when the new weights or the server's state are not finite.

    Args:
        updates: Closed updates.
        weights: Weights that they change.
        largest: Largest entry that the change of each may have in any case.

    Raises:
        WrongBundleError: The weights themselves are not finite, and no update is to blame.
    """
    if not_finite(weights.tensors) is not None:
        raise WrongBundleError("weights: expected finite tensors, found NaN or Inf; start from the round before")
    tensors = weights.flat
    base = flatten(tensors, weights.tensors)
    refused: dict[int, FedparaError] = {}
    for number, update in enumerate(updates):
        try:
            update.reopen()
            position = _overflow(update, base, largest[number])
        except InvalidUpdateError as error:
            refused[number] = error
            continue
        finally:
            update.close()
        if position is not None:
            refused[number] = InvalidUpdateError(
                f"{update.path}: tensor {name_at(tensors, position)!r}: expected a change that leaves the weights "
                "finite, found one too large for float32; the training diverged: lower its learning rate",
                code="overflow",
            )
    return refused


def _overflow(update: Update, base: NDArray[np.float32], largest: float) -> int | None:
    for start, stop in chunks(len(base)):
        change = np.empty(stop - start, np.float32)
        update.decoder.decode(start, change)
        moved = np.abs(base[start:stop] + change.astype(np.float64))
        too_large = np.flatnonzero(~((moved <= _LARGEST) & (np.abs(change) <= largest)))
        if too_large.size:
            return start + int(too_large[0])
    return None
