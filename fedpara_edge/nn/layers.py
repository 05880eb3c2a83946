"""`Linear` and `Conv2d` with a factored weight, in place of torch's.

Both take torch's arguments and, by keyword, the parameterization of the weight. The factors are parameters of the
module under the names of `fedpara_edge.factors.compose` (`x1`, `y1`, `t1`, `x2`, `y2`, `t2`; `weight` for kind
`dense`; `u`, `v` for kind `update`, beside buffers `base`, `mask`, `a` and `b`), next to `bias`. The forward pass
composes the weight and calls torch's own operator, so it exports to ONNX as plain operators.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpara_edge.errors import InputError
from fedpara_edge.factors.compose import compose, contraction, factor_shapes, held_shapes, part_shapes
from fedpara_edge.factors.factorization import Init
from fedpara_edge.factors.layout import Form, Kind, LayerSpec
from fedpara_edge.factors.rank import UpdateOptions, equal_size_rank, layer_spec, minimum_rank
from fedpara_edge.nn.init import initialize


class FactoredLayer(nn.Module):
    """Base of all factored layers and weights: a spec, its factors, and the composed weight.

    Reading `weight` of a factored layer composes it, for code that reads `layer.weight`; it can't be assigned.
    """

    spec: LayerSpec
    bias: nn.Parameter | None

    def __init__(
        self,
        spec: LayerSpec,
        *,
        bias: bool,
        device: Any,
        dtype: torch.dtype | None,
        init: Init,
        initial_std: float | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.init, self.initial_std = spec, init, initial_std
        for part, shape in factor_shapes(spec).items():
            self.register_parameter(part, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        for part, shape in held_shapes(spec).items():
            self.register_buffer(part, torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(spec.shape[0], device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def factors(self) -> dict[str, nn.Parameter]:
        """Parameters that the weight is composed of, by part."""
        return {part: getattr(self, part) for part in factor_shapes(self.spec)}

    def parts(self) -> dict[str, Tensor]:
        """Parameters and buffers that the weight is composed of, by part."""
        return {part: getattr(self, part) for part in part_shapes(self.spec)}

    def compose(self) -> Tensor:
        """Composed weight, of shape `spec.shape`."""
        weight: Tensor = compose(self.spec, self.parts(), torch.tanh)
        return weight

    def reset_parameters(self) -> None:
        """Redraw the factors by `init`, with `initial_std` as that of a composed weight, and zero the bias."""
        initialize(self.spec, self.parts(), init=self.init, std=self.initial_std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "spec" in self.__dict__ and self.spec.kind != "dense":
            return self.compose()
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        spec = self.spec
        made_of = spec.kind if spec.kind == "dense" else f"{spec.kind}, rank={spec.rank}, form={spec.form}"
        return f"{tuple(spec.shape)}, {made_of}{', tanh' if spec.tanh else ''}, bias={self.bias is not None}"


class FactoredWeight(FactoredLayer):
    """A weight of a layer that has several; called without arguments, it returns the composed weight."""

    def __init__(
        self,
        spec: LayerSpec,
        *,
        initial_std: float | None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        init: Init = "composed",
    ) -> None:
        super().__init__(spec, bias=False, device=device, dtype=dtype, init=init, initial_std=initial_std)

    def forward(self) -> Tensor:
        """Composed weight, of `spec.shape`."""
        return self.compose()


class Linear(FactoredLayer):
    """Linear layer y = x Wᵀ + b with W composed of factors (Proposition 1; pFedPara: section 2.3).

    Args:
        in_features: Number I of input features.
        out_features: Number O of output features.
        bias: Whether the layer has a bias.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        kind: `fedpara`, `pfedpara`, `lowrank`, `dense` or `update`.
        rank: Inner rank R; by default the smallest that attains full rank (`lowrank`, `update`: that of equal size).
        tanh: Whether W = tanh(W1) ⊙ tanh(W2), for `fedpara` only.
        update: Options of the kind `update`.
        init: Initialization of the factors (`fedpara_edge.nn.init`).
        initial_std: Rms of a composed weight; He's standard deviation if None.
        name: Name of the layer in its spec and in errors.

    Shapes: x float [..., I], result [..., O].

    With the attribute `contracted` set (neither with `tanh` nor for `dense` or `update`), the same result is computed
    without composing the weight (`fedpara_edge.factors.compose.contraction`), which is cheaper for few rows and a small
    rank.

    Raises:
        InputError: The rank is not positive, or `tanh` is requested for a kind other than `fedpara`.

    >>> layer = Linear(784, 256, rank=16)
    >>> {name: tuple(p.shape) for name, p in layer.named_parameters()}
    {'x1': (256, 16), 'y1': (784, 16), 'x2': (256, 16), 'y2': (784, 16), 'bias': (256,)}
    >>> layer(torch.ones(3, 784)).shape
    torch.Size([3, 256])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        kind: Kind = "fedpara",
        rank: int | None = None,
        tanh: bool = False,
        update: UpdateOptions = UpdateOptions(),
        init: Init = "composed",
        initial_std: float | None = None,
        name: str = "",
    ) -> None:
        shape = (out_features, in_features)
        rank = _rank(shape, kind=kind, form="matrix", rank=rank)
        spec = layer_spec(
            shape,
            name=name,
            kind=kind,
            form="matrix",
            rank=rank,
            tanh=tanh,
            update=update,
        )
        super().__init__(spec, bias=bias, device=device, dtype=dtype, init=init, initial_std=initial_std)
        self.in_features, self.out_features = in_features, out_features
        self.contracted = False

    def forward(self, x: Tensor) -> Tensor:
        if self.contracted:
            left, right = contraction(self.spec, self.factors(), lambda parts: torch.cat(parts, dim=-1))
            return F.linear(x @ left, right, self.bias)
        return F.linear(x, self.compose(), self.bias)


class Conv2d(FactoredLayer):
    """Two-dimensional convolution with W composed of factors (Propositions 1 and 3; pFedPara: section 2.3).

    Args:
        in_channels: Number I of input channels.
        out_channels: Number O of output channels.
        kernel_size: Size of the kernel, (K1, K2) or one number for both.
        stride: Stride, one number or two.
        padding: Padding, one number, two, `same` or `valid`.
        dilation: Dilation, one number or two.
        groups: Number of groups, which must be 1; there is no factored grouped convolution.
        bias: Whether the layer has a bias.
        padding_mode: Padding mode, which must be `zeros`; there is no other.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        kind: `fedpara`, `pfedpara`, `lowrank`, `dense` or `update`.
        rank: Inner rank R; by default the smallest that attains full rank (`lowrank`, `update`: that of equal size).
        form: `tensor` (Proposition 3) or `matrix` (Proposition 1, on [O, I K1 K2]).
        tanh: Whether W = tanh(W1) ⊙ tanh(W2), for `fedpara` only.
        update: Options of the kind `update`.
        init: Initialization of the factors (`fedpara_edge.nn.init`).
        initial_std: Rms of a composed weight; He's standard deviation if None.
        name: Name of the layer in its spec and in errors.

    Shapes: x float [N, I, H, W] or [I, H, W], result [N, O, H', W'] or [O, H', W'].

    Raises:
        InputError: The rank or `tanh` is invalid, as for `Linear`; or the convolution is grouped, is padded with
            anything but zeros, or has `same` padding with a stride.

    >>> Conv2d(64, 128, 3, padding="same", rank=13)(torch.zeros(1, 64, 8, 8)).shape
    torch.Size([1, 128, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        kind: Kind = "fedpara",
        rank: int | None = None,
        form: Form = "tensor",
        tanh: bool = False,
        update: UpdateOptions = UpdateOptions(),
        init: Init = "composed",
        initial_std: float | None = None,
        name: str = "",
    ) -> None:
        self_name, remedy = f"layer {name!r}" if name else "Conv2d", "keep this layer dense (exclude it)"
        if groups != 1:
            raise InputError(f"{self_name}: expected groups=1, found {groups}; {remedy}")
        if padding_mode != "zeros":
            raise InputError(f"{self_name}: expected padding_mode='zeros', found {padding_mode!r}; {remedy}")
        if isinstance(padding, str) and padding not in ("same", "valid"):
            raise InputError(f"{self_name}: expected a padding of numbers, 'same' or 'valid', found {padding!r}")
        if padding == "same" and _pair(stride) != (1, 1):
            raise InputError(f"{self_name}: padding='same' needs stride 1, found {stride}; give the padding in numbers")
        shape = (out_channels, in_channels, *_pair(kernel_size))
        rank = _rank(shape, kind=kind, form=form, rank=rank)
        spec = layer_spec(
            shape,
            name=name,
            kind=kind,
            form=form,
            rank=rank,
            tanh=tanh,
            update=update,
        )
        super().__init__(spec, bias=bias, device=device, dtype=dtype, init=init, initial_std=initial_std)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, _pair(kernel_size)
        self.stride, self.dilation = _pair(stride), _pair(dilation)
        self.padding = padding if isinstance(padding, str) else _pair(padding)
        self.groups, self.padding_mode = groups, padding_mode

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.compose(), self.bias, self.stride, self.padding, self.dilation)


def _rank(shape: tuple[int, ...], *, kind: Kind, form: Form, rank: int | None) -> int:
    if rank is not None or kind == "dense":
        return rank or 0
    smallest = minimum_rank(shape, form=form)
    if kind in ("lowrank", "update"):
        return equal_size_rank(shape, rank=smallest, form=form, kind=kind)
    return smallest


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
