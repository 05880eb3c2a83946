"""Model as it is deployed: raw inputs in, outputs out, preprocessing inside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from export.forward.outputs import Chosen
from fedpara_edge.errors import InputError
from fedpara_edge.formats.inputs import InputDtype


class Preprocessing:
    """Preprocessing of one input: uint8 is scaled to [0, 1], then (x - mean) / std by channel.

    Args:
        dtype: Dtype of the raw input; `int64` (tokens) and `bool` go to the model as they are.
        shape: Shape of one raw example.
        mean: One number, or one for each channel; channels are the first dimension of an example, or else the last.
        std: One positive number, or one for each channel.

    Raises:
        InputError: Mean and std do not fit the shape, or are given for tokens.
    """

    def __init__(
        self,
        dtype: InputDtype,
        shape: Sequence[int],
        *,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
    ) -> None:
        given = max(len(mean), len(std))
        last = given > 1 and given != shape[0] and given == shape[-1]
        channels = shape[-1 if last else 0] if shape else 1
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, channels):
                raise InputError(
                    f"{name}: expected 1 number or {channels}, one for each channel of {tuple(shape)}, "
                    f"found {len(values)}"
                )
        if not all(math.isfinite(value) for value in (*mean, *std)) or min(std) <= 0:
            raise InputError(f"mean and std: expected finite numbers and positive std, found {mean} and {std}")
        self.as_it_is = dtype in ("int64", "bool")
        if self.as_it_is and (any(mean) or set(std) != {1.0}):
            raise InputError(f"mean and std: expected none for {dtype} input, which goes to the model as it is")
        unit = 255.0 if dtype == "uint8" else 1.0
        self.scale = [1.0 / (unit * value) for value in std]
        self.shift = [-m / s for m, s in zip(_spread(mean, len(std)), _spread(std, len(mean)), strict=True)]
        self.channel_shape = [-1] if last else [-1] + [1] * (len(shape) - 1)

    def __call__(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Input [B, ...] as the model takes it, for a raw input [B, ...]."""
        if self.as_it_is:
            return x
        x = x.to(dtype)
        if set(self.scale) != {1.0}:
            x = x * self._constant(self.scale, dtype)
        if any(self.shift):
            x = x + self._constant(self.shift, dtype)
        return x

    @property
    def normalizes(self) -> bool:
        """Whether a mean or a standard deviation was declared."""
        return any(self.shift) or len(set(self.scale)) > 1 or self.scale[0] not in (1.0, 1.0 / 255.0)

    def raw(self, preprocessed: NDArray[Any]) -> NDArray[Any]:
        """Raw input [B, ...], in double precision and not rounded, whose preprocessing gives these values."""
        scale, shift = (np.reshape(values, self.channel_shape) for values in (self.scale, self.shift))
        return np.asarray((preprocessed - shift) / scale)

    def _constant(self, values: list[float], dtype: torch.dtype) -> torch.Tensor | float:
        if len(values) == 1:
            return values[0]
        return torch.tensor(values, dtype=dtype).reshape(self.channel_shape)


@dataclass(frozen=True)
class Argument:
    """Argument of a model's `forward`.

    Args:
        keyword: Name of the argument; None for the first one, whatever its name is.
        preprocessing: Preprocessing of the raw input.
    """

    keyword: str | None
    preprocessing: Preprocessing


class Deployed(nn.Module):
    """`model` behind the preprocessing of its inputs, and with chosen outputs alone.

    Args:
        model: Model that takes float32 [B, ...] (int64 for `int64`, bool for `bool`).
        arguments: Arguments of the model, in the order of the raw inputs.
        chosen: Outputs to give.
    """

    def __init__(self, model: nn.Module, arguments: Sequence[Argument], chosen: Chosen) -> None:
        super().__init__()
        self.model = model
        self.arguments, self.chosen = tuple(arguments), chosen
        self.dtype = torch.float32  # a float64 copy serves as the reference of `verify`

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Chosen outputs [B, ...] for raw inputs [B, ...]; of a single one, that itself."""
        outputs = tuple(self.by_name(*inputs).values())
        return outputs[0] if len(outputs) == 1 else outputs

    def by_name(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Chosen outputs by name.

        Raises:
            InputError: The model has others.
        """
        given = [
            (each.keyword, each.preprocessing(x, self.dtype)) for each, x in zip(self.arguments, inputs, strict=True)
        ]
        positional = [x for keyword, x in given if keyword is None]
        return self.chosen.by_name(self.model(*positional, **{k: x for k, x in given if k is not None}))


def _spread(values: Sequence[float], count: int) -> Sequence[float]:
    return values if len(values) >= count else tuple(values) * count
