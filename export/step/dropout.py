"""Dropout whose mask is determined by a seed, the same on every machine and runtime.

Entry i of the mask is a hash of i and two keys, which are hashes of the seed and of the layer's number: the integer
hash of two rounds of multiplication and shift (a bijection on 32 bits), in int64 without overflow.
"""

from __future__ import annotations

import numpy as np
import torch
from onnx import NodeProto, TensorProto

from export.gradients import Graph

LIMIT, SCALE = ".dropout_limit", ".dropout_scale"
_MASK = 2**32 - 1
_FACTORS = 0x21F0AAAD, 0x735A2D97  # below 2^31, so that a product with 32 bits fits into int64
_SHIFTS = 16, 15, 15


def drops(graph: Graph, node: NodeProto) -> bool:
    """Whether a Dropout of the forward graph drops anything in training.

    Raises:
        NotImplementedError: Its ratio or its mode is not constant.
    """
    name = node.input[2] if len(node.input) > 2 else ""
    mode = graph.constant(name) if name else np.array(False)
    if mode is None:
        raise NotImplementedError("a Dropout whose mode is not constant")
    return bool(mode) and _ratio(graph, node) > 0


def _ratio(graph: Graph, node: NodeProto) -> float:
    """Ratio of a Dropout; one half where it is left out, as the standard has it."""
    name = node.input[1] if len(node.input) > 1 else ""
    ratio = graph.constant(name) if name else np.array(0.5)
    if ratio is None:
        raise NotImplementedError("a Dropout whose ratio is not constant")
    return float(ratio)


def dropout(graph: Graph, node: NodeProto, number: int, seed: str) -> str:
    """Append x · mask / (1 - ratio) in place of a Dropout of the forward graph; return the factor.

    The graph's constants `<node>.dropout_limit` (entries whose hash is below it are kept) and `<node>.dropout_scale`
    determine the ratio; 2^32 and 1 switch the dropout off.

    Args:
        graph: Graph to append to.
        node: Dropout node that `drops`.
        number: Number of this layer, which no other dropout of the graph has.
        seed: Name of an int64 scalar of the graph.
    """
    keep = 1.0 - _ratio(graph, node)
    limit = graph.initialize(node.output[0] + LIMIT, np.array(round(keep * 2**32), np.int64))
    scale = graph.initialize(node.output[0] + SCALE, np.array(1 / keep if keep else 0.0, np.float32))
    hashed = hashes(graph, graph.op("Size", node.input[0]), number, seed)
    kept = graph.op("Cast", graph.op("Less", hashed, limit), to=TensorProto.FLOAT)
    factor = graph.op("Reshape", graph.op("Mul", kept, scale), graph.op("Shape", node.input[0]))
    graph.define(node.output[0], "Mul", node.input[0], factor)
    return factor


def hashes(graph: Graph, size: str, number: int, seed: str) -> str:
    """Hashes [size] of 32 bits, int64, of the entries of draw `number` of a graph.

    Args:
        graph: Graph to append to.
        size: Name of an int64 scalar of the graph.
        number: Number of the draw, which no other of the graph has.
        seed: Name of an int64 scalar of the graph.
    """
    low = graph.op("BitwiseAnd", seed, _int(graph, _MASK))
    high = graph.op("BitwiseAnd", graph.op("Div", seed, _int(graph, 2**32)), _int(graph, _MASK))
    first = _hash(graph, graph.op("BitwiseXor", low, _int(graph, number + 1)), _int(graph, 0))
    second = _hash(graph, high, first)
    index = graph.op("Range", _int(graph, 0), size, _int(graph, 1))
    return _hash(graph, graph.op("BitwiseXor", index, first), second)


def hashes_in_torch(size: int, number: int, seed: torch.Tensor) -> torch.Tensor:
    """What `hashes` gives, on the device of the seed, an int64 tensor [] of at least 0."""

    def scrambled(value: torch.Tensor, key: torch.Tensor | int) -> torch.Tensor:
        for factor, shift in zip(_FACTORS, _SHIFTS[:2], strict=True):
            value = (value ^ (value >> shift)) * factor
            if factor == _FACTORS[0]:
                value = value + key
            value = value & _MASK
        return value ^ (value >> _SHIFTS[2])

    first = scrambled((seed & _MASK) ^ (number + 1), 0)
    second = scrambled(seed >> 32, first)
    return scrambled(torch.arange(size, device=seed.device) ^ first, second)


def _hash(graph: Graph, value: str, key: str) -> str:
    """Scramble int64 values of 32 bits; the key enters between the rounds."""
    for factor, shift in zip(_FACTORS, _SHIFTS[:2], strict=True):
        value = graph.op("Mul", _xor_shifted(graph, value, shift), _int(graph, factor))
        if factor == _FACTORS[0]:
            value = graph.op("Add", value, key)
        value = graph.op("BitwiseAnd", value, _int(graph, _MASK))
    return _xor_shifted(graph, value, _SHIFTS[2])


def _xor_shifted(graph: Graph, value: str, shift: int) -> str:
    bits = graph.op("Cast", value, to=TensorProto.UINT64)
    by = graph.array(np.array(shift, np.uint64))
    mixed = graph.op("BitwiseXor", bits, graph.op("BitShift", bits, by, direction="RIGHT"))
    return graph.op("Cast", mixed, to=TensorProto.INT64)


def _int(graph: Graph, value: int) -> str:
    return graph.array(np.array(value, np.int64))
