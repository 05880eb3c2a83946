"""Model as it is deployed: raw input in, outputs out, preprocessing inside."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from fedpara_edge.errors import InputError
from fedpara_edge.formats.recipe import InputDtype

TORCH_DTYPES = {"uint8": torch.uint8, "float32": torch.float32, "int64": torch.int64}


class Deployed(nn.Module):
    """`model` behind its preprocessing: uint8 is scaled to [0, 1], then (x - mean) / std by channel.

    Args:
        model: Model that takes float32 [B, ...] (int64 for `int64`).
        input_dtype: Dtype of the raw input; `int64` (tokens) goes to the model as it is.
        input_shape: Shape of one raw example.
        mean: One number, or one for each channel; channels are the first dimension of an example, or else the last.
        std: One positive number, or one for each channel.

    Raises:
        InputError: Mean and std do not fit the shape, or are given for tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        input_dtype: InputDtype,
        input_shape: Sequence[int],
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__()
        given = max(len(mean), len(std))
        last = given > 1 and given != input_shape[0] and given == input_shape[-1]
        channels = input_shape[-1 if last else 0]
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, channels):
                raise InputError(
                    f"{name}: expected 1 number or {channels}, one for each channel of {tuple(input_shape)}, "
                    f"found {len(values)}"
                )
        if not all(math.isfinite(value) for value in (*mean, *std)) or min(std) <= 0:
            raise InputError(f"mean and std: expected finite numbers and positive std, found {mean} and {std}")
        self.model = model
        self.tokens = input_dtype == "int64"
        if self.tokens and (any(mean) or set(std) != {1.0}):
            raise InputError("mean and std: expected none for int64 input, which goes to the model as it is")
        unit = 255.0 if input_dtype == "uint8" else 1.0
        self.scale = [1.0 / (unit * value) for value in std]
        self.shift = [-m / s for m, s in zip(_spread(mean, len(std)), _spread(std, len(mean)), strict=True)]
        self.channel_shape = [-1] if last else [-1] + [1] * (len(input_shape) - 1)
        self.dtype = torch.float32  # a float64 copy serves as the reference of `verify`

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs [B, ...] for raw input [B, ...]."""
        if self.tokens:
            return self.model(x)  # type: ignore[no-any-return]
        x = x.to(self.dtype)
        if set(self.scale) != {1.0}:
            x = x * self._constant(self.scale)
        if any(self.shift):
            x = x + self._constant(self.shift)
        return self.model(x)  # type: ignore[no-any-return]

    def _constant(self, values: list[float]) -> torch.Tensor | float:
        if len(values) == 1:
            return values[0]
        return torch.tensor(values, dtype=self.dtype).reshape(self.channel_shape)


def _spread(values: Sequence[float], count: int) -> Sequence[float]:
    return values if len(values) >= count else tuple(values) * count
