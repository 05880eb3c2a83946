"""Pooling in operators that both engines can differentiate.

onnxruntime-training's gradient of AveragePool divides by zero with a dynamic batch and takes the process down. Windows
that tile the input become a Reshape and a ReduceMean; all others become a depthwise Conv with ones, then a
multiplication by one over the number of entries that each window counts. Adaptive pooling may have windows of several
sizes: their means are products with matrices, and for their maxima they are filled up to one size with copies of their
last entries.

Each function here makes the translation of a pooling along 1, 2 or 3 axes. Examples without channels, such as [N, L]
pooled along L, get one for as long as they are pooled; torch takes N for the channels of a single example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxscript import opset18 as op
from torch.nn import functional as F

Translation = Callable[..., Any]


def avg_pool(axes: int) -> Translation:
    """Translation of `aten.avg_pool1d`, `avg_pool2d` or `avg_pool3d`, with all of their options."""

    def translate(
        x: Any,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Any:
        images, channels, size = _images(x, axes)
        kernel, pads = (_each(values, axes) for values in (kernel_size, padding))
        strides = _each(stride, axes) if stride else kernel
        tiles = kernel == strides and not any(pads) and not any(n % k for n, k in zip(size, kernel, strict=True))
        if tiles and divisor_override is None:
            counts = [n // k for n, k in zip(size, kernel, strict=True)]
            return _like(x, _mean_of_tiles(images, channels, size, counts), axes)
        ones = torch.ones(1, 1, *size)
        pool, convolve = _FUNCTIONS[axes]
        divisor = {} if divisor_override is None else {"divisor_override": divisor_override}
        weights = pool(ones, kernel, strides, pads, ceil_mode, count_include_pad, **divisor)
        reach = [(n - 1) * s + k for n, s, k in zip(weights.shape[2:], strides, kernel, strict=True)]
        after = [max(r - n - p, 0) for r, n, p in zip(reach, size, pads, strict=True)]
        window = torch.ones(1, 1, *kernel)
        around = [
            n for pair in zip(pads[::-1], after[::-1], strict=True) for n in pair
        ]  # F.pad has the last axis first
        entries = convolve(F.pad(ones, around), window, stride=strides)
        sums = op.Conv(
            images,
            _constant(window.expand(channels, 1, *kernel)),
            group=channels,
            kernel_shape=kernel,
            strides=strides,
            pads=[*pads, *after],
        )
        kept = (slice(None), slice(None), *(slice(n) for n in entries.shape[2:]))
        return _like(x, op.Mul(sums, _constant((weights / entries)[kept])), axes)

    return translate


_FUNCTIONS: dict[int, tuple[Any, Any]] = {
    1: (F.avg_pool1d, F.conv1d),
    2: (F.avg_pool2d, F.conv2d),
    3: (F.avg_pool3d, F.conv3d),
}


def adaptive_avg_pool(axes: int) -> Translation:
    """Translation of `aten.adaptive_avg_pool1d`, `adaptive_avg_pool2d` or `adaptive_avg_pool3d`.

    Unless windows tile the input, it is multiplied by the matrices that pool rows, columns and layers.
    """

    def translate(x: Any, output_size: Sequence[int]) -> Any:
        images, channels, size = _images(x, axes)
        counts = [int(n) for n in output_size]
        if not any(n % t for n, t in zip(size, counts, strict=True)):
            return _like(x, _mean_of_tiles(images, channels, size, counts), axes)
        *layers, columns = (
            F.adaptive_avg_pool1d(torch.eye(n)[None], t)[0].T for n, t in zip(size, counts, strict=True)
        )
        y = op.MatMul(_constant(layers[-1]), images) if layers else images
        y = op.MatMul(y, _constant(columns.T))
        if axes == 3:
            flat = op.Reshape(y, _ints([0, channels, size[0], counts[1] * counts[2]]))
            y = op.Reshape(op.MatMul(_constant(layers[0]), flat), _ints([0, channels, *counts]))
        return _like(x, y, axes)

    return translate


def max_pool(axes: int) -> Translation:
    """Translation of `aten.max_pool1d`, `max_pool2d` or `max_pool3d`."""

    def translate(
        x: Any,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,),
        ceil_mode: bool = False,
    ) -> Any:
        images, _, _ = _images(x, axes)
        kernel = _each(kernel_size, axes)
        outputs: Any = op.MaxPool(
            images,
            ceil_mode=ceil_mode,
            dilations=_each(dilation, axes),
            kernel_shape=kernel,
            pads=_each(padding, axes) * 2,
            strides=_each(stride, axes) if stride else kernel,
        )
        return _like(x, outputs[0], axes)

    return translate


def adaptive_max_pool(axes: int) -> Translation:
    """Translation of `aten.adaptive_max_pool1d`, `adaptive_max_pool2d` or `adaptive_max_pool3d`, with the indices."""

    def translate(x: Any, output_size: Sequence[int]) -> Any:
        images, _, size = _images(x, axes)
        windows = [_windows(n, int(t)) for n, t in zip(size, output_size, strict=True)]
        for axis, (entries, n) in enumerate(zip(windows, size, strict=True), 2):
            if entries.size != n:
                images = op.Gather(images, _ints(entries.ravel().tolist()), axis=axis)
        kernel = [entries.shape[1] for entries in windows]
        outputs: Any = op.MaxPool(images, kernel_shape=kernel, strides=kernel)
        indices = _indices(outputs[1], windows, size)
        return _like(x, outputs[0], axes), _like(x, indices, axes)

    return translate


def _windows(size: int, count: int) -> NDArray[np.int64]:
    """Entries [count, longest window] of each window along an axis; short windows repeat their last.

    >>> _windows(5, 2).tolist()
    [[0, 1, 2], [2, 3, 4]]
    >>> _windows(4, 3).tolist()
    [[0, 1], [1, 2], [2, 3]]
    """
    numbers = np.arange(count)
    starts, ends = numbers * size // count, -(-(numbers + 1) * size // count)
    longest = int((ends - starts).max())
    entries: NDArray[np.int64] = np.minimum(starts[:, None] + np.arange(longest), ends[:, None] - 1)
    return entries


def _indices(places: Any, windows: Sequence[NDArray[np.int64]], size: Sequence[int]) -> Any:
    """Indices into the pixels of each channel, as torch has them, from those that MaxPool gives."""
    counts = [entries.size for entries in windows]
    places = op.Mod(places, _ints([prod(counts)]))
    terms = []
    for axis, entries in enumerate(windows):
        place = op.Mod(op.Div(places, _ints([prod(counts[axis + 1 :])])), _ints([counts[axis]]))
        entry = op.Gather(_ints(entries.ravel().tolist()), place)
        terms.append(op.Mul(entry, _ints([prod(size[axis + 1 :])])))
    return op.Sum(*terms) if len(terms) > 1 else terms[0]


def _images(x: Any, axes: int) -> tuple[Any, int, list[int]]:
    """Examples with channels, the number of channels, and the sizes of the axes along which to pool."""
    fixed = x.shape[-axes:] if len(x.shape) == axes + 1 else x.shape[1:]
    if not all(isinstance(size, int) for size in fixed):
        raise TypeError("a pooling whose channels or sizes grow with the batch")
    size = [int(n) for n in x.shape[-axes:]]
    if len(x.shape) > axes + 1:
        return x, int(x.shape[1]), size
    return op.Unsqueeze(x, _ints([1])), 1, size


def _like(x: Any, y: Any, axes: int) -> Any:
    """Result with channels only if the examples have them."""
    return y if len(x.shape) > axes + 1 else op.Squeeze(y, _ints([1]))


def _mean_of_tiles(x: Any, channels: int, size: Sequence[int], counts: Sequence[int]) -> Any:
    """Mean over tiles: [N, C, *S] reshaped to [N, C, tiles, S / tiles, ...] and averaged over every other axis."""
    split = [part for n, count in zip(size, counts, strict=True) for part in (count, n // count)]
    shape = [0, channels, *split]
    return op.ReduceMean(op.Reshape(x, _ints(shape)), _ints(range(3, len(shape), 2)), keepdims=0)


def _each(values: Sequence[int], axes: int) -> list[int]:
    return [int(value) for value in values] * (axes // len(values))


def _ints(values: Sequence[int]) -> Any:
    return op.Constant(value_ints=list(values))


def _constant(values: torch.Tensor) -> Any:
    return op.Constant(value=numpy_helper.from_array(np.ascontiguousarray(values.numpy())))
