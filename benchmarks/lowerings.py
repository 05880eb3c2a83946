"""Lowerings of convolution, pooling, ReLU and normalization to ONNX operators: the exporter's and its alternatives.

A table for each, with a row for each shape and number of threads. The column that `chosen` names is measured on the
very graph that the exporter appends for such a layer; the others are the alternatives that it does not choose there.
Each is compared with torch before it is timed. The lowerings of a row take turns, and each figure is a median; only the
ratios are meant to carry over to other machines. `chosen/fastest` is what choosing by measurement would gain: it would
pay to measure on the device where another lowering is the fastest at one number of threads than at another.

    python benchmarks/lowerings.py --layers "cnn *" --json lowerings.json
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from contests import TORCH, Contest, appended, exported, measure, random_arrays, with_gradients
from convolutions import CONVOLUTIONS, convolution_contests
from onnx import TensorProto, helper
from parts import keep_options, measure_parts
from torch import Tensor
from torch.nn import functional as F

from device_runtime.engines.ort import keep_freed_memory
from export.gradients import Graph, normalization, pooling
from export.gradients.normalization import GROUP
from fedpara_edge.cli.output import table
from fedpara_edge.nn.groupnorm import group_count

OURS = "ours"


class Pool(NamedTuple):
    """Max pooling of images."""

    shape: tuple[int, ...]
    kernel: int = 2
    stride: int = 2
    pad: int = 0

    def __str__(self) -> str:
        return f"{_by(self.shape)}, {self.kernel}x{self.kernel}/{self.stride}"


POOLS = {
    "cnn pool1": Pool((32, 28, 28)),
    "cnn pool3": Pool((128, 7, 7)),
    "vgg16 pool1": Pool((64, 32, 32)),
    "overlapping pool": Pool((64, 32, 32), kernel=3, stride=2, pad=1),
}
RELUS = {"cnn relu1": (32, 28, 28), "vgg16 relu1_1": (64, 32, 32)}
NORMS = {"cnn norm1": (32, 28, 28), "cnn norm3": (128, 7, 7), "vgg16 norm1_1": (64, 32, 32), "layer norm": (64, 256)}
"""Shapes to normalize: images by groups, vectors over the last axis."""


def pooling_contest(layer: str, pool: Pool, batch: int) -> Contest:
    """Contest of max pooling and its gradient together, as the indices of maxima cost time in the forward pass."""
    channels, *size = pool.shape
    out = [(n + 2 * pool.pad - pool.kernel) // pool.stride + 1 for n in size]
    arrays = random_arrays(x=(batch, *pool.shape), dy=(batch, channels, *out))
    given: dict[str, Any] = {
        "kernel_shape": [pool.kernel] * 2,
        "strides": [pool.stride] * 2,
        "pads": [pool.pad] * 4,
    }
    node = helper.make_node("MaxPool", ["x"], ["y"], **given)

    def unpooled(graph: Graph) -> Sequence[str]:
        y, indices = graph.ops("MaxPool", "x", outputs=2, **given)
        return y, graph.op("MaxUnpool", "dy", indices, graph.op("Shape", "x"), **given)

    def scattered(graph: Graph) -> Sequence[str]:
        y, indices = graph.ops("MaxPool", "x", outputs=2, **given)
        indices, gradient = (graph.reshape(value, [-1]) for value in (indices, "dy"))
        zeros = graph.op("ConstantOfShape", graph.op("Shape", graph.reshape("x", [-1])))
        grad_x = graph.op("ScatterElements", zeros, indices, gradient, axis=0, reduction="add")
        return y, graph.op("Reshape", grad_x, graph.op("Shape", "x"))

    others = {"ScatterElements": scattered}
    if pool.kernel <= pool.stride:
        others = {"MaxUnpool": unpooled, **others}

    reference = with_gradients(lambda x: F.max_pool2d(x, pool.kernel, pool.stride, pool.pad), arrays, ["x"])
    lowerings = {OURS: exported(node, arrays, ["x"], forward=pooling.forward), **appended(others, arrays)}
    return Contest("max pooling and its gradient", layer, str(pool), arrays, lowerings, OURS, reference)


def relu_contest(layer: str, shape: tuple[int, ...], batch: int) -> Contest:
    """Contest of the gradient of ReLU."""
    arrays = random_arrays(x=(batch, *shape), dy=(batch, *shape))
    arrays["y"] = np.maximum(arrays["x"], 0)
    node = helper.make_node("Relu", ["x"], ["y"])

    def compared(graph: Graph) -> Sequence[str]:
        positive = graph.op("Greater", "y", graph.scalar(0.0))
        return [graph.op("Mul", "dy", graph.op("Cast", positive, to=TensorProto.FLOAT))]

    def selected(graph: Graph) -> Sequence[str]:
        return [graph.op("Where", graph.op("Greater", "y", graph.scalar(0.0)), "dy", graph.scalar(0.0))]

    def signed(graph: Graph) -> Sequence[str]:
        return [graph.op("Mul", "dy", graph.op("Sign", "y"))]

    y, dy = (torch.from_numpy(arrays[name]) for name in ("y", "dy"))
    others = {"Greater, Cast, Mul": compared, "Greater, Where": selected, "Sign, Mul": signed}
    lowerings = {OURS: exported(node, arrays, ["x"]), **appended(others, arrays)}

    def reference() -> Sequence[Tensor]:
        return [torch.ops.aten.threshold_backward(dy, y, 0.0)]

    return Contest("gradient of ReLU", layer, _by(shape), arrays, lowerings, OURS, reference)


def norm_contest(layer: str, shape: tuple[int, ...], batch: int) -> Contest:
    """Contest of group or layer normalization and all its gradients."""
    names, given = ["x", "scale", "bias"], {"epsilon": 1e-5}
    if len(shape) == 2:
        scale, rows, axes = shape[-1:], [-1, *shape], [0, 1]
        size, node = _by(shape), helper.make_node("LayerNormalization", names, ["y"], **given)
    else:
        channels, groups = shape[0], group_count(shape[0])
        scale, rows, axes = (channels, 1, 1), [-1, groups, prod(shape) // groups], [0, 2, 3]
        size, node = f"{_by(shape)}, {groups} groups", helper.make_node(GROUP, names, ["y"], groups=groups, **given)

    def compute(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        if len(shape) == 2:
            return F.layer_norm(x, shape[-1:], scale, bias)
        return F.group_norm(x, groups, scale.flatten(), bias.flatten())

    arrays = random_arrays(x=(batch, *shape), dy=(batch, *shape), scale=scale, bias=scale)
    operator = partial(_by_operator, rows=rows, shape=shape, axes=axes)
    lowerings = {
        OURS: exported(node, arrays, names, forward=normalization.forward),
        **appended({"LayerNormalization": operator}, arrays),
    }
    reference = with_gradients(compute, arrays, names)
    return Contest("normalization and its gradient", layer, size, arrays, lowerings, OURS, reference)


def _by_operator(graph: Graph, *, rows: Sequence[int], shape: Sequence[int], axes: Sequence[int]) -> Sequence[str]:
    """LayerNormalization of rows [N, G, M]; the gradients of scale and bias are sums over `axes` of [N, *shape]."""
    ones, zeros = (graph.array(np.full(rows[-1], value, np.float32)) for value in (1, 0))
    normal, _, inverse = graph.ops("LayerNormalization", graph.reshape("x", rows), ones, zeros, outputs=3, epsilon=1e-5)
    whole = graph.reshape(normal, [-1, *shape])
    y = graph.op("Add", graph.op("Mul", whole, "scale"), "bias")
    grad_scale, grad_bias = graph.sum(graph.op("Mul", "dy", whole), axes), graph.sum("dy", axes)
    gradient = graph.reshape(graph.op("Mul", "dy", "scale"), rows)
    drift, share = (
        graph.op("ReduceMean", value, graph.ints(2)) for value in (gradient, graph.op("Mul", gradient, normal))
    )
    rest = graph.op("Sub", graph.op("Sub", gradient, drift), graph.op("Mul", normal, share))
    return y, graph.reshape(graph.op("Mul", rest, inverse), [-1, *shape]), grad_scale, grad_bias


def contests(layers: str, batch: int) -> dict[str, Callable[[], Iterable[Contest]]]:
    """Functions that make the rows of each layer that matches a pattern, by layer."""
    rows: dict[str, Callable[[], Iterable[Contest]]] = {
        layer: partial(convolution_contests, layer, conv, batch) for layer, conv in CONVOLUTIONS.items()
    }
    others = ((pooling_contest, POOLS), (relu_contest, RELUS), (norm_contest, NORMS))
    for contest, shapes in others:
        rows |= {layer: partial(_only, contest, layer, shape, batch) for layer, shape in shapes.items()}
    return {layer: make for layer, make in rows.items() if fnmatch(layer, layers)}


def _only(contest: Callable[..., Contest], layer: str, shape: Any, batch: int) -> list[Contest]:
    return [contest(layer, shape, batch)]


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def report(results: Mapping[str, Any]) -> str:
    """Tables of the results."""
    rows = results["rows"]
    parts = [f"milliseconds for a batch of {results['batch']} (medians)"]
    for title in dict.fromkeys(row["table"] for row in rows):
        parts += [title, _table([row for row in rows if row["table"] == title])]
    return "\n\n".join(parts)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = [name for name in dict.fromkeys(chain.from_iterable(row["ms"] for row in rows)) if name != TORCH]
    fastest = [min(ms for name, ms in row["ms"].items() if name != TORCH) for row in rows]
    chosen = [row["ms"][row["chosen"]] for row in rows]
    cells = [
        (
            row["layer"],
            row["size"],
            row["threads"],
            *(f"{row['ms'][name]:.2f}" if name in row["ms"] else "-" for name in (*names, TORCH)),
            row["chosen"],
            f"{own / best:.2f}",
        )
        for row, own, best in zip(rows, chosen, fastest, strict=True)
    ]
    sums = {"the fastest": sum(fastest), TORCH: sum(row["ms"][TORCH] for row in rows)}
    ratios = ", ".join(f"{sum(chosen) / total:.2f} times {name}" for name, total in sums.items())
    header = ("layer", "shape", "threads", *names, TORCH, "chosen", "chosen/fastest")
    return f"{table(header, cells)}\n\nall chosen lowerings together take {ratios}"


@click.command()
@click.option("--layers", default="*", show_default=True, help="Pattern of the layers to measure.")
@click.option("--batch", default=32, show_default=True)
@click.option("--threads", default="1,2", show_default=True)
@click.option("--repetitions", default=7, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@keep_options
def main(
    layers: str, batch: int, threads: str, repetitions: int, json_file: Path | None, kept: Path | None, again: bool
) -> None:
    """Measure, print the tables, and write them as JSON."""
    keep_freed_memory()
    counts = [int(count) for count in threads.split(",")]
    found = contests(layers, batch)
    if not found:
        raise click.BadParameter(f"expected a pattern that matches a layer, found {layers!r}", param_hint="--layers")
    settings = {"batch": batch, "threads": counts}

    def measure_layer(layer: str) -> list[dict[str, Any]]:
        return [measure(contest, count, repetitions) for contest in found[layer]() for count in counts]

    def all_of(parts: Mapping[str, Any]) -> dict[str, Any]:
        return {**settings, "rows": [*chain.from_iterable(parts.values())]}

    measured = measure_parts(
        {layer: partial(measure_layer, layer) for layer in found},
        lambda parts: report(all_of(parts)),
        settings={**settings, "repetitions": repetitions},
        kept=kept,
        again=again,
    )
    results = all_of(measured)
    click.echo(report(results))
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
