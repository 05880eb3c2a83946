"""Layout of a PyTorch model: its layers, and every tensor with its part and role."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fedpara_edge.errors import InputError
from fedpara_edge.factors.compose import factor_role, held_shapes, part_shapes
from fedpara_edge.factors.layout import LayerSpec, Layout, Operator, Part, Role, TensorSpec
from fedpara_edge.factors.update import velocity_spec
from fedpara_edge.nn.batchnorm import BatchStatisticsNorm, FixedNorm, RunningNorm
from fedpara_edge.nn.layers import FactoredLayer

NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, _NormBase, FixedNorm, BatchStatisticsNorm, RunningNorm)
STATISTICS: dict[str, Part] = {"running_mean": "mean", "running_var": "variance"}
DTYPES = frozenset(("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"))


def layout_of(model: nn.Module) -> Layout:
    """Layers and tensors of a model, in the order of its `state_dict`, and the velocities of updates.

    Layers are the factored ones of this package and torch's own Linear and (ungrouped) Conv2d, which are `dense`.
    Tensors are all parameters and persistent buffers. A tensor that the model holds under several names appears once,
    under the first; so does a module.

    Raises:
        InputError: A trainable tensor is not float32, or the dtype of a frozen one is unknown to numpy.

    >>> from fedpara_edge.nn.layers import Linear
    >>> layout = layout_of(nn.Sequential(Linear(6, 4, kind="pfedpara", rank=2), nn.LayerNorm(4)))
    >>> [(tensor.name, tensor.part, tensor.role) for tensor in layout.tensors][1:6]
    ... # doctest: +NORMALIZE_WHITESPACE
    [('0.y1', 'y1', 'shared'), ('0.x2', 'x2', 'personal'), ('0.y2', 'y2', 'personal'), ('0.bias', 'bias', 'shared'),
     ('1.weight', 'norm', 'shared')]
    """
    layers: list[LayerSpec] = []
    tensors: list[TensorSpec] = []
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        fresh = [(part, tensor) for part, tensor in _tensors(module) if id(tensor) not in seen]
        seen.update(id(tensor) for _, tensor in fresh)
        layer = _layer(module_name, module)
        if layer is not None and any(part not in ("bias",) for part, _ in fresh):
            layers.append(layer)
        tensors.extend(_tensor_spec(module_name, module, layer, part, tensor) for part, tensor in fresh)
        if layer is not None and layer.base_momentum and module.get_parameter("u").requires_grad:
            tensors.append(velocity_spec(layer))
    return Layout(layers=tuple(layers), tensors=tuple(tensors))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that a module itself adds to the `state_dict`, in its order."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer


def _layer(name: str, module: nn.Module) -> LayerSpec | None:
    if isinstance(module, FactoredLayer):
        return replace(module.spec, name=name)
    weight = module._parameters.get("weight")
    if weight is None or not isinstance(module, nn.Linear | nn.Conv2d):
        return None
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return None
    operator: Operator = "linear" if isinstance(module, nn.Linear) else "conv2d"
    return LayerSpec(name=name, operator=operator, kind="dense", form="matrix", shape=tuple(weight.shape), rank=0)


def _tensor_spec(module_name: str, module: nn.Module, layer: LayerSpec | None, name: str, tensor: Tensor) -> TensorSpec:
    full_name = f"{module_name}.{name}" if module_name else name
    dtype = str(tensor.dtype).removeprefix("torch.")
    role, part = _role(module, layer, name, tensor), _part(module, name)
    if role != "frozen" and tensor.dtype != torch.float32:
        raise InputError(f"tensor {full_name!r}: trainable tensors are float32, found {dtype}; use model.float()")
    if dtype not in DTYPES:
        expected = ", ".join(sorted(DTYPES))
        raise InputError(f"tensor {full_name!r}: expected a dtype of {expected}, found {dtype}; convert it")
    shape = tuple(tensor.shape)
    return TensorSpec(name=full_name, shape=shape, dtype=dtype, layer=module_name, part=part, role=role)


def _role(module: nn.Module, layer: LayerSpec | None, name: str, tensor: Tensor) -> Role:
    if isinstance(module, RunningNorm) and (tensor.requires_grad or name in STATISTICS):
        return "personal" if module.local else "shared"
    if layer is not None and name in held_shapes(layer) and module.get_parameter("u").requires_grad:
        return factor_role(layer, name)
    if not tensor.requires_grad:
        return "frozen"
    return "shared" if layer is None else factor_role(layer, name)


def _part(module: nn.Module, name: str) -> Part:
    if isinstance(module, RunningNorm) and name in STATISTICS:
        return STATISTICS[name]
    if isinstance(module, NORMS):
        return "norm" if name in ("weight", "bias") else "other"
    if name in ("weight", "bias") or (isinstance(module, FactoredLayer) and name in part_shapes(module.spec)):
        return name  # type: ignore[return-value]
    return "other"
