"""Attention masks in torch's own transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn.modules import transformer


@contextmanager
def masks_unread() -> Iterator[None]:
    """Context in which `nn.Transformer` and its parts take a mask as it is.

    They compare it with the causal mask to choose a faster kernel for the same result; an export knows no values.
    """
    compare = transformer._detect_is_causal_mask

    def as_told(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        del mask, size
        return is_causal is True

    transformer._detect_is_causal_mask = as_told
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = compare
