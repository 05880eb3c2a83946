"""Kind `update`: what is factored is the update of the weight, not the weight.

    W + M ⊙ (U Bᵀ + A Vᵀ)        M = c S,    seen as a matrix [m, n] = [O, I K1 K2]

W [m, n], the *base*, is dense and stays on the device. A [m, R], B [n, R] and the signs S are drawn from a seed that
server and devices know. U [m, R] and V [n, R] start at zero; they alone are trained, sent and averaged. Since the
weight is linear in them, the mean of the factors is the mean of the weights. S lifts the rank of the update above 2 R,
and after `reset_every` rounds, a *period*, the update is folded into the base, and another begins in new directions: so
the sum of all updates has no bound on its rank.

What is where. U and V are tensors of role `shared`, as any others: updates, changes, codecs and aggregation know
nothing else. W has the role `base` and is in weights files alone. A, B and M have the role `drawn` and are in no file.
With personal U and V, which are never folded, there is a single period, and no momentum.

The seed of a layer in period p = round // reset_every is the number whose 8 bytes, lowest first, begin the SHA-256 of
the UTF-8 text "fedpara-edge/update <fingerprint of the bundle> <p> <name of the layer>". From the bytes of `splitmix`,
one after the other: A and B, in C order, of a byte x for each entry, (2 x - 255) / 256; then S, in C order, of a bit
for each entry, where a set bit means minus. M is S times c in float32.

Folding. With a round whose number is a multiple of `reset_every`, the base moves and the factors are zero again:

    W ← float32(W + M ⊙ (Û Bᵀ + A V̂ᵀ)),    U, V ← 0

in float64, where Û and V̂ are U and V rounded to multiples of 2^(e - k), with 2^e the smallest power of two above all
their entries and k = 45 - ⌈log2 2R⌉. A and B being multiples of 2^-8, no sum in the product then needs more than 53
bits: it is exact in whatever order, and a server, a device and a browser get the same bits of W. So the base of an
update (`formats.weights`) is the digest of W itself, and who followed all changes has the same weights as who took a
snapshot.

Momentum. With a `base_momentum` β above 0, the base moves by a *velocity* P [m, n], as a heavy ball:

    Δ = M ⊙ (Û Bᵀ + A V̂ᵀ),    P ← float32(β P + Δ),    W ← float32(W + P)

in float64 as well, where β P, the sum with Δ and the sum with W are rounded once each; Δ is 0 where all of U and V are.
P has the role `velocity`, is zero before the first fold, and is in weights files, and their digest, alone: nothing is
composed of it, so no training reads it. It does for the base what `fedavgm` does for all that is not folded.

Source: FedMUD (arXiv 2505.23176), from which are the directions drawn on either side and the reset; the signs are ours.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.errors import InputError, brief
from fedpara_edge.factors.compose import held_shapes, part_shapes
from fedpara_edge.factors.layout import LayerSpec, Layout, TensorSpec
from fedpara_edge.factors.splitmix import random_bytes

Tensors = Mapping[str, NDArray[Any]]
_PARTS = frozenset(("u", "v", "base", "velocity", "mask", "a", "b"))
_ROLES = frozenset(("base", "velocity", "drawn"))
"""Parts and roles that only tensors of updates have."""


def draw_directions(layer: LayerSpec, fingerprint: str, period: int) -> dict[str, NDArray[np.float32]]:
    """Mask M and directions A and B of a layer, float32 by part.

    Args:
        layer: Layer of kind `update`.
        fingerprint: Fingerprint of the bundle.
        period: Number of the period, from 0 on.

    >>> fields = {"name": "fc", "operator": "linear", "form": "matrix", "kind": "update", "shape": (2, 3), "rank": 1}
    >>> drawn = draw_directions(LayerSpec(**fields, scale=0.5, reset_every=1), "f", 0)
    >>> drawn["a"].ravel().tolist(), drawn["mask"].ravel().tolist()
    ([-0.48046875, 0.01953125], [-0.5, 0.5, 0.5, -0.5, -0.5, 0.5])
    """
    text = f"fedpara-edge/update {fingerprint} {period} {layer.name}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    shapes, entries = held_shapes(layer), math.prod(layer.shape)
    rows, columns = (math.prod(shapes[part]) for part in "ab")
    drawn = random_bytes(seed, 0, -(-(rows + columns + -(-entries // 8)) // 8))
    values = (2 * drawn[: rows + columns].astype(np.float32) - 255) / 256
    bits = np.unpackbits(drawn[rows + columns :], count=entries, bitorder="little")
    scale = np.float32(layer.scale)
    return {
        "mask": np.where(bits, -scale, scale).reshape(layer.shape),
        "a": values[:rows].reshape(shapes["a"]),
        "b": values[rows:].reshape(shapes["b"]),
    }


def drawn_tensors(layout: Layout, fingerprint: str, round: int) -> dict[str, NDArray[np.float32]]:
    """All tensors of role `drawn` with which a round is trained, float32 by name.

    Args:
        layout: Layout of the model.
        fingerprint: Fingerprint of the bundle.
        round: Round of the weights that the training starts from.
    """
    found: dict[str, NDArray[np.float32]] = {}
    for layer in layout.layers:
        parts = layout.parts(layer)
        if "mask" in parts and parts["mask"].role == "drawn":
            period = round // layer.reset_every if parts["u"].role == "shared" else 0
            directions = draw_directions(layer, fingerprint, period)
            found |= {parts[part].name: values for part, values in directions.items()}
    return found


def fold_update(
    base: NDArray[np.float32], u: NDArray[np.float32], v: NDArray[np.float32], drawn: Tensors
) -> NDArray[np.float32]:
    """Base after an update is folded into it without momentum, the same bits everywhere.

    Args:
        base: Base, float32 [O, I] or [O, I, K1, K2].
        u: Factor U, finite float32 [m, R].
        v: Factor V, finite float32 [n, R].
        drawn: Mask `mask` and directions `a` and `b` (`draw_directions`).
    """
    moved = _composed(u, v, drawn)
    return base if moved is None else _sum(moved, base)


def fold_with_momentum(
    base: NDArray[np.float32],
    velocity: NDArray[np.float32],
    u: NDArray[np.float32],
    v: NDArray[np.float32],
    drawn: Tensors,
    *,
    momentum: float,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Base and velocity after an update is folded with momentum, the same bits everywhere.

    Args:
        base: Base, float32 [O, I] or [O, I, K1, K2].
        velocity: Velocity, float32 in the shape of the base.
        u: Factor U, finite float32 [m, R].
        v: Factor V, finite float32 [n, R].
        drawn: Mask `mask` and directions `a` and `b` (`draw_directions`).
        momentum: Momentum β.
    """
    moved, kept = _composed(u, v, drawn), momentum * velocity.astype(np.float64)
    velocity = _sum(kept, np.float32(0) if moved is None else moved)
    return _sum(velocity.astype(np.float64), base), velocity


def _composed(u: NDArray[np.float32], v: NDArray[np.float32], drawn: Tensors) -> NDArray[np.float64] | None:
    """Composed update Δ, in the shape of the weight; None if U and V are zero."""
    largest = float(max(np.abs(u).max(), np.abs(v).max()))
    if largest == 0:
        return None
    bits = 45 - math.ceil(math.log2(2 * u.shape[1]))
    unit = math.ldexp(1.0, math.frexp(largest)[1] - bits)
    exact = [np.rint(factor.astype(np.float64) / unit) * unit for factor in (u, v)]
    left, right = np.hstack([exact[0], drawn["a"]]), np.hstack([drawn["b"], exact[1]])
    moved = drawn["mask"].astype(np.float64)
    moved *= (left @ right.T).reshape(moved.shape)
    return moved


def _sum(total: NDArray[np.float64], added: NDArray[Any] | np.float32) -> NDArray[np.float32]:
    """Sum in float32, each entry rounded to float64 first; `total` is overwritten."""
    total += added
    with np.errstate(over="ignore"):
        return total.astype(np.float32)


def folded(layout: Layout, tensors: Tensors, fingerprint: str, round: int) -> dict[str, NDArray[Any]]:
    """Tensors of the weights of a round, with the updates folded whose period ends with it.

    Args:
        layout: Layout of the model.
        tensors: Tensors by name, with updates in the directions of the round before; those that are not finite stay as
            they are, to be refused.
        fingerprint: Fingerprint of the bundle.
        round: Round of the weights.
    """
    result = dict(tensors)
    for layer in layout.layers:
        if is_at_start(layout, layer, round):
            names = {part: tensor.name for part, tensor in layout.parts(layer).items()}
            u, v = result[names["u"]], result[names["v"]]
            if np.isfinite(u).all() and np.isfinite(v).all():
                drawn, base = draw_directions(layer, fingerprint, round // layer.reset_every - 1), result[names["base"]]
                if "velocity" in names:
                    velocity = result[names["velocity"]]
                    base, velocity = fold_with_momentum(base, velocity, u, v, drawn, momentum=layer.base_momentum)
                    result[names["velocity"]] = velocity
                else:
                    base = fold_update(base, u, v, drawn)
                result |= {names["base"]: base, names["u"]: np.zeros_like(u), names["v"]: np.zeros_like(v)}
    return result


def check_updates(layout: Layout) -> None:
    """Refuse a layout with an update whose tensors are not those of its layer, or with such tensors elsewhere.

    Raises:
        InputError: A tensor is missing, one too many, or has another shape, or U and V have different roles; or a
            tensor that only updates have is of no update.
    """
    updates = {layer.name for layer in layout.layers if layer.kind == "update"}
    for tensor in layout.tensors:
        if (tensor.part in _PARTS or tensor.role in _ROLES) and tensor.layer not in updates:
            raise InputError(
                f"tensor {brief(tensor.name)}: expected a layer of kind update for one of part {tensor.part} and role "
                f"{tensor.role}, found {brief(tensor.layer)}"
            )
    for layer in layout.layers:
        if layer.kind == "update":
            parts, composed = layout.parts(layer), part_shapes(layer)
            roles = {parts[part].role for part in "uv" if part in parts}
            moves = layer.base_momentum > 0 and roles == {"shared"}
            shapes = {**composed, "velocity": layer.shape} if moves else composed
            found = {part: parts[part].shape for part in (*composed, "velocity") if part in parts}
            if found != shapes or len(roles) > 1 or (moves and parts["velocity"].role != "velocity"):
                raise InputError(
                    f"layer {brief(layer.name)}: expected the tensors of an update, {', '.join(shapes)}, found others"
                )


def velocity_spec(layer: LayerSpec) -> TensorSpec:
    """Velocity of the base of an update, a tensor of the layout that the model itself has not."""
    name = f"{layer.name}.velocity" if layer.name else "velocity"
    return TensorSpec(name=name, shape=layer.shape, dtype="float32", layer=layer.name, part="velocity", role="velocity")


def weight_tensors(layout: Layout) -> tuple[TensorSpec, ...]:
    """Tensors of the weights of a round: shared ones, and what updates are folded into."""
    return layout.with_role("shared", "base", "velocity")


def stored_tensors(layout: Layout, round: int) -> list[TensorSpec]:
    """Tensors in a file with the weights of a round: all but the factors that begin at zero, and so do velocities."""
    zero = starting_factors(layout, round)
    still = {layer.name for layer in layout.layers if round < layer.reset_every}
    return [
        tensor
        for tensor in weight_tensors(layout)
        if tensor.name not in zero and not (tensor.role == "velocity" and tensor.layer in still)
    ]


def starting_factors(layout: Layout, round: int) -> frozenset[str]:
    """Names of the factors that begin at zero, in directions of their own, with the weights of a round."""
    layers = [layer for layer in layout.layers if is_at_start(layout, layer, round)]
    return frozenset(layout.parts(layer)[part].name for layer in layers for part in "uv")


def is_at_start(layout: Layout, layer: LayerSpec, round: int) -> bool:
    """Whether a period starts with a round, whose weights then have zero as the factors of a layer's shared update."""
    parts = layout.parts(layer)
    return "base" in parts and parts["u"].role == "shared" and round % layer.reset_every == 0
