"""The weights that factors compose to, kept finite and from exploding in one round.

Factors that are all finite can compose to weights that are not: four of 1e12 make 1e48. A largest entry of a layer is
`GROWTH` times that before, or `LARGEST` if that is more, for layers that begin at 0.

It is first bounded by the Cauchy-Schwarz inequality, which costs no more than reading the factors once:

    |Σ_ab T[a, b, k] X[o, a] Y[i, b]| <= ||T[:, :, k]|| ||X[o]|| ||Y[i]||

and only a layer beyond this is composed. Of pFedPara only W1 is looked at: W2 never leaves the devices. Of an update,
what it adds to the weight is bounded by c √R (||U[o]|| + ||V[i]||), and that is held to `LARGEST`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.aggregation.effort import USUAL, Effort
from fedpara_edge.codecs.codec import flatten, unflatten
from fedpara_edge.codecs.decoding import decode_all
from fedpara_edge.errors import FedparaError, InvalidUpdateError
from fedpara_edge.factors.compose import compose_named, factor_shapes, travelling
from fedpara_edge.factors.layout import LayerSpec, Layout, TensorSpec
from fedpara_edge.formats.update import Update
from fedpara_edge.formats.weights import Weights

GROWTH = 1000.0
LARGEST = 1e6

Tensors = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Exploded:
    """A layer whose weight exploded: what was expected of it, and the largest entry that was found."""

    expected: str
    found: str


def find_exploded(layout: Layout, tensors: Tensors, base: Tensors, *, effort: Effort = USUAL) -> Exploded | None:
    """The first layer whose weight exploded; None if none did.

    Args:
        layout: Layout of the model.
        tensors: Shared tensors by name, finite.
        base: The same tensors before the round.
        effort: Division of the work.
    """
    layers = [(layer, travelling(layout, layer)) for layer in layout.layers]
    bounds = effort.each(
        lambda seen: 0.0 if seen is None or seen.tanh else _bound(layout, seen, tensors), [seen for _, seen in layers]
    )
    for (layer, seen), bound in zip(layers, bounds, strict=True):
        if layer.kind == "update" and (added := _added(layout, layer, tensors)) > LARGEST:
            return Exploded(f"layer {layer.name!r}: expected an update of at most {LARGEST:.3g}", f"{added:.3g}")
        if seen is None or bound <= LARGEST:
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            before, largest = (np.abs(compose_named(layout, seen, each)).max() for each in (base, tensors))
        most = max(LARGEST, GROWTH * float(before)) if np.isfinite(before) else LARGEST
        if not largest <= most:
            return Exploded(f"layer {layer.name!r}: expected composed weights of at most {most:.3g}", f"{largest:.3g}")
    return None


def find_exploding(updates: Sequence[Update], weights: Weights) -> dict[int, FedparaError]:
    """The errors of the updates whose own change makes a layer explode, by their number; every update is read again.

    Args:
        updates: Closed updates.
        weights: Weights that they change.
    """
    layout, refused = weights.layout, dict[int, FedparaError]()
    tensors = weights.flat
    base = flatten(tensors, weights.tensors)
    for number, update in enumerate(updates):
        try:
            update.reopen()
            change = decode_all(update.decoder, len(base))
        except InvalidUpdateError as error:
            refused[number] = error
            continue
        finally:
            update.close()
        with np.errstate(over="ignore", invalid="ignore"):
            moved = unflatten(tensors, base + change)
        if (found := find_exploded(layout, moved, weights.tensors)) is not None:
            refused[number] = InvalidUpdateError(
                f"{update.path}: {found.expected}, found {found.found}; the training diverged: lower its learning rate",
                code="exploded",
            )
    return refused


def _added(layout: Layout, layer: LayerSpec, tensors: Tensors) -> float:
    """A number that nothing an update adds to the weight exceeds, up to the 1 that directions stay below."""
    factors = [np.asarray(tensors[part.name], np.float64) for part in _travelling_update(layout, layer)]
    return float(layer.scale * np.sqrt(layer.rank) * sum(np.linalg.norm(each, axis=1).max() for each in factors))


def _travelling_update(layout: Layout, layer: LayerSpec) -> list[TensorSpec]:
    """Factors of an update that travel."""
    parts = layout.parts(layer)
    return [parts[part] for part in "uv" if parts[part].role == "shared"]


def _bound(layout: Layout, layer: LayerSpec, tensors: Tensors) -> float:
    """A number that no entry of the weight exceeds; infinite or NaN if it is beyond float64."""
    parts, bound = layout.parts(layer), 1.0
    with np.errstate(over="ignore", invalid="ignore"):
        for part in factor_shapes(layer):
            factor = np.asarray(tensors[parts[part].name], np.float64)
            bound *= np.sqrt(np.square(factor).sum(axis=(0, 1) if part.startswith("t") else 1).max())
    return float(bound)
