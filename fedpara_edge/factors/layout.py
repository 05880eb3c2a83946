"""Layout of a model: its layers, the factors of each, and the tensors that travel or stay on the device.

The layout is the part of a bundle that the server, the device and the file formats share. It is plain data:
`to_json` and `from_json` are inverses of each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, get_args

from fedpara_edge.errors import InputError, brief, brief_text

Kind = Literal["fedpara", "pfedpara", "lowrank", "dense", "update"]
Operator = Literal["linear", "conv2d"]
Form = Literal["matrix", "tensor"]
Role = Literal["shared", "personal", "frozen", "base", "velocity", "drawn"]
Part = Literal[
    "x1", "y1", "t1", "x2", "y2", "t2", "u", "v", "base", "velocity", "mask", "a", "b",
    "weight", "bias", "norm", "mean", "variance", "other",
]  # fmt: skip

KINDS: tuple[Kind, ...] = get_args(Kind)
OPERATORS: tuple[Operator, ...] = get_args(Operator)
ROLES: tuple[Role, ...] = get_args(Role)
PARTS: tuple[Part, ...] = get_args(Part)
FORMS: tuple[Form, ...] = get_args(Form)
UPDATE: frozenset[str] = frozenset(("u", "v"))
"""Factors of an update, in the directions of their period alone."""
FACTORS: frozenset[str] = frozenset(("x1", "y1", "t1", "x2", "y2", "t2")) | UPDATE
STATISTICS: frozenset[str] = frozenset(("mean", "variance"))
"""Parts that follow the batches of a training instead of a gradient: running statistics."""
RESERVED = "__metadata__"
"""Name that no tensor can have in a safetensors file."""
_WEIGHT = FACTORS | {"weight"}
_MAX_DIMENSIONS = 32
_MAX_ENTRIES = 1 << 60


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """Specification of one Linear or Conv2d layer and of the parameterization of its weight.

    Args:
        name: Dotted module path in the model, as in `state_dict`.
        operator: `linear` (weight [O, I]) or `conv2d` (weight [O, I, K1, K2]).
        kind: `fedpara`, `pfedpara`, `lowrank`, `dense`, or `update` (`fedpara_edge.factors.update`).
        form: `matrix` (Proposition 1, on [O, I K1 K2]) or `tensor` (Proposition 3); `matrix` for linear layers and for
            updates.
        shape: Shape of the composed (dense) weight.
        rank: Inner rank R of each factor pair; 0 for `dense`.
        tanh: Whether each Hadamard operand passes through tanh (the paper's nonlinearity).
        scale: Scale c of an update; 0 for the other kinds.
        reset_every: Rounds after which an update is folded and begins anew; 0 for the other kinds.
        base_momentum: Momentum β of the base of an update, from 0 to below 1; 0 for the other kinds.
    """

    name: str
    operator: Operator
    kind: Kind
    form: Form
    shape: tuple[int, ...]
    rank: int
    tanh: bool = False
    scale: float = 0.0
    reset_every: int = 0
    base_momentum: float = 0.0

    def __post_init__(self) -> None:
        if self.operator not in OPERATORS:
            raise InputError(
                f"layer {brief(self.name)}: unknown operator {brief(self.operator)}, expected one of "
                f"{', '.join(OPERATORS)}"
            )
        expected = 2 if self.operator == "linear" else 4
        if len(self.shape) != expected or min(self.shape) < 1:
            raise InputError(
                f"layer {brief(self.name)}: a {self.operator} weight has {expected} positive dimensions, found "
                f"{brief(self.shape)}"
            )
        if self.kind not in KINDS:
            raise InputError(
                f"layer {brief(self.name)}: unknown kind {brief(self.kind)}, expected one of {', '.join(KINDS)}"
            )
        if self.form not in FORMS:
            raise InputError(
                f"layer {brief(self.name)}: unknown form {brief(self.form)}, expected one of {', '.join(FORMS)}"
            )
        if self.operator == "linear" and self.form != "matrix":
            raise InputError(f"layer {brief(self.name)}: a linear layer has no tensor form; use form='matrix'")
        if (self.kind == "dense") != (self.rank == 0) or self.rank < 0:
            raise InputError(
                f"layer {brief(self.name)}: rank is 0 for a dense layer and positive for the others, "
                f"found {brief(self.rank)} for {self.kind}"
            )
        if self.tanh and self.kind != "fedpara":
            raise InputError(
                f"layer {brief(self.name)}: the tanh variant exists for kind 'fedpara' only, found {self.kind}"
            )
        updates = self.kind == "update"
        if updates and self.form != "matrix":
            raise InputError(f"layer {brief(self.name)}: an update has no tensor form; use form='matrix'")
        if updates and self.rank > min(self.matrix_shape):
            raise InputError(
                f"layer {brief(self.name)}: expected an update of a rank of at most {min(self.matrix_shape)}, found "
                f"{brief(self.rank)}"
            )
        if (0 < self.scale < math.inf) != updates or (self.reset_every > 0) != updates:
            raise InputError(
                f"layer {brief(self.name)}: a scale and a number of rounds are positive for an update and 0 for the "
                f"others, found {brief(self.scale)} and {brief(self.reset_every)} for {self.kind}"
            )
        if not (0 <= self.base_momentum < 1 if updates else self.base_momentum == 0):
            raise InputError(
                f"layer {brief(self.name)}: the momentum of a base is from 0 to below 1 for an update and 0 for the "
                f"others, found {brief(self.base_momentum)} for {self.kind}"
            )

    @property
    def dense_parameters(self) -> int:
        """Number of entries of the composed weight."""
        return math.prod(self.shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape (m, n) of the weight seen as a matrix: [O, I K1 K2]."""
        return self.shape[0], math.prod(self.shape[1:])


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Specification of one tensor of the model.

    Args:
        name: Name in `state_dict`, in the ONNX graphs and in every file.
        shape: Shape of the tensor; `()` for a scalar.
        dtype: Name of the numpy dtype; trainable tensors are `float32`.
        layer: Name of the module that holds the tensor.
        part: Part within that layer: a factor, `weight`, `bias`, `norm` (of a normalization), `mean` or `variance` (its
            running statistics) or `other`.
        role: `shared` for a tensor that travels, `personal` for one that changes and stays on the device, `frozen` for
            one that never changes; of an update, `base` for the weight that it is folded into and `velocity` for
            what that last moved by, which are in no update, and `drawn` for what comes from a seed and is in no file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layer: str
    part: Part
    role: Role

    def __post_init__(self) -> None:
        if self.role not in ROLES or self.part not in PARTS:
            raise InputError(
                f"tensor {brief(self.name)}: expected a role of {', '.join(ROLES)} and a part of {', '.join(PARTS)}, "
                f"found {brief(self.role)} and {brief(self.part)}"
            )
        if self.name == RESERVED:
            raise InputError(f"tensor {brief(self.name)}: expected another name, which no safetensors file can hold")

    @cached_property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """All layers and all tensors of a model, in the order of its `state_dict`, which has no velocities."""

    layers: tuple[LayerSpec, ...]
    tensors: tuple[TensorSpec, ...]

    @cached_property
    def _hash(self) -> int:
        return hash((self.layers, self.tensors))

    def __hash__(self) -> int:
        return self._hash  # kept, as that of all tensors takes long and caches ask for it for every update

    @cached_property
    def shared(self) -> tuple[TensorSpec, ...]:
        """Tensors that travel, trained ones and statistics."""
        return self.with_role("shared")

    @cached_property
    def trained(self) -> tuple[TensorSpec, ...]:
        """Tensors that gradients change, shared and personal."""
        return tuple(tensor for tensor in self.with_role("shared", "personal") if tensor.part not in STATISTICS)

    @cached_property
    def statistics(self) -> tuple[TensorSpec, ...]:
        """Tensors that the batches of a training change, shared and personal."""
        return tuple(tensor for tensor in self.with_role("shared", "personal") if tensor.part in STATISTICS)

    @cached_property
    def held(self) -> tuple[TensorSpec, ...]:
        """Tensors of updates that training reads and does not change."""
        return self.with_role("base", "drawn")

    def with_role(self, *roles: Role) -> tuple[TensorSpec, ...]:
        """Tensors of the given roles, in order."""
        return tuple(tensor for tensor in self.tensors if tensor.role in roles)

    @cached_property
    def _by_layer(self) -> dict[str, dict[str, TensorSpec]]:
        table: dict[str, dict[str, TensorSpec]] = {}
        for tensor in self.tensors:
            table.setdefault(tensor.layer, {})[tensor.part] = tensor
        return table

    def parts(self, layer: LayerSpec) -> Mapping[str, TensorSpec]:
        """Factors (or the weight) of one layer, and its bias if it has one, by part."""
        return self._by_layer.get(layer.name, {})

    @cached_property
    def shared_parameters(self) -> int:
        """Number of entries that travel in one direction."""
        return sum(tensor.size for tensor in self.shared)

    @cached_property
    def frozen_parameters(self) -> int:
        """Number of entries of weights, biases and normalizations that are not trained."""
        return sum(tensor.size for tensor in self.with_role("frozen") if tensor.part != "other")

    @cached_property
    def dense_parameters(self) -> int:
        """Number of trainable entries, and of statistics, of the same model with every layer dense."""
        trained = self.with_role("shared", "personal")
        weights = {layer.name: layer.dense_parameters for layer in self.layers}
        composed = {t.layer for t in trained if t.layer in weights and t.part in _WEIGHT}
        rest = sum(t.size for t in trained if not (t.layer in weights and t.part in _WEIGHT))
        return rest + sum(weights[name] for name in composed)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`."""
        return {"layers": [plain(layer) for layer in self.layers], "tensors": [plain(t) for t in self.tensors]}

    @staticmethod
    def from_json(data: Any) -> Layout:
        """Layout from the plain data that `to_json` returned.

        Raises:
            InputError: A field is missing or has the wrong type, or a name occurs twice.
        """
        try:
            layers = tuple(LayerSpec(**_fields(layer)) for layer in data["layers"])
            tensors = tuple(TensorSpec(**_fields(tensor)) for tensor in data["tensors"])
            _check_unique(layer.name for layer in layers)
            _check_unique(tensor.name for tensor in tensors)
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(
                f"layout: expected the fields of this version, found {brief_text(str(error), max_length=200)}"
            ) from error
        return Layout(layers, tensors)


def plain(spec: LayerSpec | TensorSpec) -> dict[str, Any]:
    """Plain data of a layer or tensor for `json.dumps`, without what is of updates, or momentum, alone."""
    values = {field.name: getattr(spec, field.name) for field in fields(spec)}
    if isinstance(spec, LayerSpec) and spec.kind != "update":
        del values["scale"], values["reset_every"]
    if isinstance(spec, LayerSpec) and not spec.base_momentum:
        del values["base_momentum"]
    return {**values, "shape": list(spec.shape)}


def _fields(data: Any) -> dict[str, Any]:
    """Fields of a layer or tensor, checked for their types, from JSON that anyone may have written.

    Raises:
        TypeError, KeyError, ValueError: A field is missing or has another type.
    """
    if not isinstance(data, dict):
        raise TypeError(f"{brief(data)} where fields are expected")
    for name, value in data.items():
        if name == "tanh":
            fits = isinstance(value, bool)
        elif name in ("rank", "reset_every"):
            fits = _is_natural(value)
        elif name in ("scale", "base_momentum"):
            fits = type(value) is float
        elif name == "shape":
            fits = isinstance(value, list) and len(value) <= _MAX_DIMENSIONS and all(map(_is_natural, value))
            fits = fits and math.prod(size or 1 for size in value) <= _MAX_ENTRIES
        else:
            # UnicodeEncodeError, a ValueError, is raised for text without UTF-8 bytes to take a digest of.
            fits = isinstance(value, str) and value.encode() is not None
        if not fits:
            raise ValueError(f"{brief_text(name)} {brief(value)}")
    return {**data, "shape": tuple(data["shape"])}


def _is_natural(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_ENTRIES


def _check_unique(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"the name {brief(name)} twice")
        seen.add(name)
