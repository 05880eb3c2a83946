"""Computing in double precision whatever a model's code computes in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


@contextmanager
def doubling() -> Iterator[None]:
    """Context in which new tensors are float64 by default, and float64 is what code gets that asks for float32.

    A model whose weights are float64 fails without it where its `forward` makes a tensor of its own, as in
    `torch.zeros(len(x), 8)`, and loses precision where it casts, as in `mask.float()`.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Doubling():
            yield
    finally:
        torch.set_default_dtype(default)


class _Doubling(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map(_doubled, (args, kwargs or {}))
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*args, **(kwargs or {}))


def _doubled(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
