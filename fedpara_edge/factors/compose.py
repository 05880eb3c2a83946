"""The factors of a layer: their shapes, their number, and the weight they compose to.

With ⊙ the Hadamard product and ×ₙ the mode-n product, for a weight of shape [O, I] or [O, I, K1, K2]:

| kind       | form   | weight                                                  | parameters             |
|------------|--------|---------------------------------------------------------|------------------------|
| `fedpara`  | matrix | (X1 Y1ᵀ) ⊙ (X2 Y2ᵀ)                                     | 2R(O + I K1 K2)        |
| `fedpara`  | tensor | (T1 ×₁ X1 ×₂ Y1) ⊙ (T2 ×₁ X2 ×₂ Y2)                     | 2R(O + I + R K1 K2)    |
| `pfedpara` | both   | W1 ⊙ (W2 + 1)                                           | as `fedpara`           |
| `lowrank`  | matrix | X1 Y1ᵀ                                                  | R(O + I K1 K2)         |
| `lowrank`  | tensor | T1 ×₁ X1 ×₂ Y1 (Tucker-2)                               | R(O + I + R K1 K2)     |
| `dense`    |        | W                                                       | O I K1 K2              |
| `update`   | matrix | W + M ⊙ (U Bᵀ + A Vᵀ)                                   | R(O + I K1 K2)         |

Of an `update`, only U and V are trained; W, M, A and B are held (`fedpara_edge.factors.update`).
With `tanh`, `fedpara` is tanh(W1) ⊙ tanh(W2). Source: FedPara (arXiv 2108.06098v3), Propositions 1 and 3, section 2.2
and supplement B; pFedPara, section 2.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.factors.layout import FACTORS, LayerSpec, Layout, Role


def factor_shapes(layer: LayerSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that parameterize the weight of `layer`, and may be trained, by part.

    >>> layer = LayerSpec(name="fc", operator="linear", kind="fedpara", form="matrix", shape=(256, 784), rank=16)
    >>> factor_shapes(layer)
    {'x1': (256, 16), 'y1': (784, 16), 'x2': (256, 16), 'y2': (784, 16)}
    """
    if layer.kind == "dense":
        return {"weight": layer.shape}
    rank, rows = layer.rank, layer.shape[0]
    if layer.kind == "update":
        return {"u": (rows, rank), "v": (layer.matrix_shape[1], rank)}
    branch: dict[str, tuple[int, ...]]
    if layer.form == "matrix":
        branch = {"x": (rows, rank), "y": (layer.matrix_shape[1], rank)}
    else:
        branch = {"t": (rank, rank, *layer.shape[2:]), "x": (rows, rank), "y": (layer.shape[1], rank)}
    branches = (1,) if layer.kind == "lowrank" else (1, 2)
    return {f"{part}{index}": shape for index in branches for part, shape in branch.items()}


def held_shapes(layer: LayerSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that the weight of an update is composed of besides its factors, by part; else none."""
    if layer.kind != "update":
        return {}
    (rows, columns), rank = layer.matrix_shape, layer.rank
    return {"base": layer.shape, "mask": layer.shape, "a": (rows, rank), "b": (columns, rank)}


def part_shapes(layer: LayerSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that the weight of `layer` is composed of, by part."""
    return {**factor_shapes(layer), **held_shapes(layer)}


def factor_count(layer: LayerSpec) -> int:
    """Number of entries in the factors of `layer` (in its weight, for a dense layer)."""
    return sum(math.prod(shape) for shape in factor_shapes(layer).values())


def factor_role(layer: LayerSpec, part: str) -> Role:
    """Role of a part of a layer: `personal` for the second factors of pFedPara (section 2.3), `shared` for others.

    What the weight of an update is composed of besides its factors is `base` or `drawn`.
    """
    if part in held_shapes(layer):
        return "base" if part == "base" else "drawn"
    return "personal" if layer.kind == "pfedpara" and part.endswith("2") else "shared"


def attainable_rank(layer: LayerSpec) -> int:
    """Largest rank that the weight, seen as a matrix [O, I K1 K2], can attain.

    min(O, I K1 K2, R²) for FedPara's matrix form (Proposition 1), min(O, I K1 K2, R) for the low-rank one. An update
    moves a weight of full rank.
    In tensor form, the same holds with R² and R for the first unfolding (Proposition 3).
    """
    full = min(layer.matrix_shape)
    if layer.kind in ("dense", "update"):
        return full
    return min(full, layer.rank if layer.kind == "lowrank" else layer.rank**2)


def compose_branch(layer: LayerSpec, factors: Mapping[str, Any], index: int) -> Any:
    """One branch, W1 or W2: X Yᵀ, or T ×₁ X ×₂ Y with Y contracted first, in the shape of the weight.

    Works on numpy arrays and torch tensors alike.
    """
    x, y = factors[f"x{index}"], factors[f"y{index}"]
    if layer.form == "matrix":
        return (x @ y.T).reshape(layer.shape)
    rank = layer.rank
    inner = y @ factors[f"t{index}"].reshape(rank, rank, -1)  # [R, I, K1 K2]
    return (x @ inner.reshape(rank, -1)).reshape(layer.shape)


def compose_update(factors: Mapping[str, Any]) -> Any:
    """Weight W + M ⊙ (U Bᵀ + A Vᵀ) of an update, or some rows of it, from the same rows of W, M, U and A."""
    product = factors["u"] @ factors["b"].T + factors["a"] @ factors["v"].T
    return factors["base"] + factors["mask"] * product.reshape(factors["mask"].shape)


def combine(layer: LayerSpec, w1: Any, w2: Any, tanh: Callable[[Any], Any]) -> Any:
    """Hadamard product of the two branches of a `fedpara` or `pfedpara` layer."""
    if layer.kind == "pfedpara":
        return w1 * (w2 + 1)
    return tanh(w1) * tanh(w2) if layer.tanh else w1 * w2


def compose(layer: LayerSpec, factors: Mapping[str, Any], tanh: Callable[[Any], Any]) -> Any:
    """Weight of `layer`, composed of its factors.

    Args:
        layer: Layer that the weight belongs to.
        factors: Arrays (numpy or torch, float) by part, with the shapes of `part_shapes`; other parts are ignored.
        tanh: Elementwise tanh of the arrays' library (`numpy.tanh`, `torch.tanh`).

    Returns:
        Weight, of shape `layer.shape`.

    >>> import numpy as np
    >>> layer = LayerSpec(name="fc", operator="linear", kind="fedpara", form="matrix", shape=(3, 2), rank=1)
    >>> compose(layer, {part: np.full(shape, 2.0) for part, shape in factor_shapes(layer).items()}, np.tanh)
    array([[16., 16.],
           [16., 16.],
           [16., 16.]])
    """
    if layer.kind == "dense":
        return factors["weight"]
    if layer.kind == "update":
        return compose_update(factors)
    w1 = compose_branch(layer, factors, 1)
    return w1 if layer.kind == "lowrank" else combine(layer, w1, compose_branch(layer, factors, 2), tanh)


def compose_named(layout: Layout, layer: LayerSpec, tensors: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    """Weight of a layer in double precision, composed of the tensors of a model.

    Args:
        layout: Layout of the model.
        layer: Layer that the weight belongs to, or the same as far as it is to be composed.
        tensors: Tensors by name, at least those that the weight is composed of.
    """
    parts = layout.parts(layer)
    factors = {part: np.asarray(tensors[parts[part].name], np.float64) for part in part_shapes(layer)}
    return np.asarray(compose(layer, factors, np.tanh))


def travelling(layout: Layout, layer: LayerSpec) -> LayerSpec | None:
    """The layer as far as its factors travel and compose to a weight: W1 alone for pFedPara; None if there are none.

    None for an update as well: the weight is linear in its factors, whose mean is that of the weights.
    """
    if layer.kind == "update":
        return None
    seen = replace(layer, kind="lowrank") if layer.kind == "pfedpara" else layer
    parts = factor_shapes(seen)
    tensors = layout.parts(layer)
    if not parts.keys() <= FACTORS or any(tensors[part].role != "shared" for part in parts):
        return None
    return seen


ROWWISE = frozenset(("x1", "x2", "u", "a", "base", "mask"))
"""Parts in matrix form with a row for each row of the weight."""


def compose_rows(layer: LayerSpec, factors: Mapping[str, Any], tanh: Callable[[Any], Any]) -> Any:
    """Some rows of the weight of a factored layer in matrix form, from the same rows of its parts.

    Args:
        layer: Layer [V, D] that the weight belongs to.
        factors: Arrays (numpy or torch, float) by part, with the rows of those in `ROWWISE` instead of all.
        tanh: Elementwise tanh of the arrays' library.

    Returns:
        Rows [..., D].

    >>> import numpy as np
    >>> layer = LayerSpec(name="e", operator="linear", kind="fedpara", form="matrix", shape=(9, 3), rank=2)
    >>> factors = {part: np.random.rand(*shape) for part, shape in factor_shapes(layer).items()}
    >>> some = {part: factor[[5, 7]] if part.startswith("x") else factor for part, factor in factors.items()}
    >>> np.allclose(compose_rows(layer, some, np.tanh), compose(layer, factors, np.tanh)[[5, 7]])
    True
    """
    if layer.kind == "update":
        return compose_update(factors)
    w1 = factors["x1"] @ factors["y1"].T
    return w1 if layer.kind == "lowrank" else combine(layer, w1, factors["x2"] @ factors["y2"].T, tanh)


def contraction(
    layer: LayerSpec, factors: Mapping[str, Any], concatenate: Callable[[list[Any]], Any]
) -> tuple[Any, Any]:
    """Matrices L [I, S] and R [O, S] with W = R Lᵀ, which yield x Wᵀ = (x L) Rᵀ without composing W.

    The Hadamard product of two products is the product of the row-wise Khatri-Rao products, L = Y1 ⊛ Y2 and
    R = X1 ⊛ X2 with S = R². For pFedPara's W1 ⊙ (W2 + 1), Y1 and X1 are appended to them, so that S = R² + R; for
    low-rank, L = Y1 and R = X1.

    Args:
        layer: Linear layer that is neither dense nor an update nor has tanh.
        factors: Arrays (numpy or torch, float) by part.
        concatenate: Function that joins arrays of the library along their last axis.

    >>> import numpy as np
    >>> layer = LayerSpec(name="fc", operator="linear", kind="fedpara", form="matrix", shape=(3, 2), rank=2)
    >>> factors = {part: np.random.rand(*shape) for part, shape in factor_shapes(layer).items()}
    >>> left, right = contraction(layer, factors, lambda parts: np.concatenate(parts, axis=-1))
    >>> np.allclose(right @ left.T, compose(layer, factors, np.tanh))
    True
    """
    left, right = factors["y1"], factors["x1"]
    if layer.kind == "lowrank":
        return left, right
    products = [_khatri_rao(left, factors["y2"]), _khatri_rao(right, factors["x2"])]
    if layer.kind == "pfedpara":
        products = [concatenate([products[0], left]), concatenate([products[1], right])]
    return products[0], products[1]


def _khatri_rao(a: Any, b: Any) -> Any:
    """Row-wise Khatri-Rao product [n, R²] of `a` and `b`, both [n, R]: all products of two entries of the same row."""
    return (a[:, :, None] * b[:, None, :]).reshape(a.shape[0], -1)
