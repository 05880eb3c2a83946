"""Average pooling in operators that onnxruntime-training can differentiate.

Its gradient of AveragePool divides by zero with a dynamic batch and takes the process down. Windows that tile the input
become a Reshape and a ReduceMean; all others become a depthwise Conv with ones, then a multiplication by one over the
number of entries that each window counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from onnx import numpy_helper
from onnxscript import opset18 as op
from torch.nn import functional as F


def avg_pool(
    x: Any,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """`aten.avg_pool1d`, `avg_pool2d` and `avg_pool3d`, with all of their options."""
    size = [int(n) for n in x.shape[2:]]
    kernel, pads = (_each(values, len(size)) for values in (kernel_size, padding))
    strides = _each(stride, len(size)) if stride else kernel
    tiles = kernel == strides and not any(pads) and not any(n % k for n, k in zip(size, kernel, strict=True))
    if tiles and divisor_override is None:
        return _mean_of_tiles(x, [n // k for n, k in zip(size, kernel, strict=True)])
    ones = torch.ones(1, 1, *size)
    pool, convolve = _FUNCTIONS[len(size)]
    divisor = {} if divisor_override is None else {"divisor_override": divisor_override}
    weights = pool(ones, kernel, strides, pads, ceil_mode, count_include_pad, **divisor)
    reach = [(n - 1) * s + k for n, s, k in zip(weights.shape[2:], strides, kernel, strict=True)]
    after = [max(r - n - p, 0) for r, n, p in zip(reach, size, pads, strict=True)]
    window = torch.ones(1, 1, *kernel)
    around = [n for pair in zip(pads[::-1], after[::-1], strict=True) for n in pair]  # F.pad has the last axis first
    counts = convolve(F.pad(ones, around), window, stride=strides)
    channels = int(x.shape[1])
    sums = op.Conv(
        x,
        _constant(window.expand(channels, 1, *kernel)),
        group=channels,
        kernel_shape=kernel,
        strides=strides,
        pads=[*pads, *after],
    )
    kept = (slice(None), slice(None), *(slice(n) for n in counts.shape[2:]))
    return op.Mul(sums, _constant((weights / counts)[kept]))


_FUNCTIONS: dict[int, tuple[Any, Any]] = {
    1: (F.avg_pool1d, F.conv1d),
    2: (F.avg_pool2d, F.conv2d),
    3: (F.avg_pool3d, F.conv3d),
}


def adaptive_avg_pool2d(x: Any, output_size: Sequence[int]) -> Any:
    """`aten.adaptive_avg_pool2d`: P_h x P_wᵀ with the matrices that pool rows and columns, unless windows tile."""
    size, tiles = [int(n) for n in x.shape[2:]], [int(n) for n in output_size]
    if not any(n % t for n, t in zip(size, tiles, strict=True)):
        return _mean_of_tiles(x, tiles)
    rows, columns = (F.adaptive_avg_pool1d(torch.eye(n)[None], t)[0].T for n, t in zip(size, tiles, strict=True))
    return op.MatMul(op.MatMul(_constant(rows), x), _constant(columns.T))


def _mean_of_tiles(x: Any, tiles: Sequence[int]) -> Any:
    """Mean over tiles: [N, C, *S] reshaped to [N, C, tiles, S / tiles, ...] and averaged over every other axis."""
    split = [part for n, count in zip(x.shape[2:], tiles, strict=True) for part in (count, int(n) // count)]
    shape: Any = [0, int(x.shape[1]), *split]
    target: Any = op.Constant(value_ints=shape)
    axes: Any = op.Constant(value_ints=list(range(3, len(shape), 2)))
    return op.ReduceMean(op.Reshape(x, target), axes, keepdims=0)


def _each(values: Sequence[int], axes: int) -> list[int]:
    return [int(value) for value in values] * (axes // len(values))


def _constant(values: torch.Tensor) -> Any:
    return op.Constant(value=numpy_helper.from_array(np.ascontiguousarray(values.numpy())))
