"""Padding of sliding windows, as a Conv or a pooling has it in its attributes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def window_padding(
    given: dict[str, Any], size: Sequence[int], windows: Sequence[int], kernel: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Numbers of entries added before and after each spatial axis.

    Args:
        given: Attributes of the node.
        size: Entries of the input, by spatial axis.
        windows: Entries of the output, by spatial axis.
        kernel: Positions of the kernel, by spatial axis.

    >>> window_padding({"auto_pad": "SAME_UPPER", "strides": [2]}, [5], [3], [4])
    ([1], [2])
    """
    rank, mode = len(kernel), given.get("auto_pad", "NOTSET")
    if not mode.startswith("SAME"):
        pads = given.get("pads", [0] * 2 * rank) if mode == "NOTSET" else [0] * 2 * rank
        return list(pads[:rank]), list(pads[rank:])
    strides, dilations = (given.get(name, [1] * rank) for name in ("strides", "dilations"))
    total = [
        max((t - 1) * s + d * (k - 1) + 1 - n, 0)
        for t, s, d, k, n in zip(windows, strides, dilations, kernel, size, strict=True)
    ]
    before = [n // 2 if mode == "SAME_UPPER" else n - n // 2 for n in total]
    return before, [n - b for n, b in zip(total, before, strict=True)]
