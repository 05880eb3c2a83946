"""Gradients of matrix products."""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator

import numpy as np
from onnx import NodeProto

from export.forward.tracing import Batch, Dim
from export.gradients.builder import Graph, attributes, static
from export.gradients.rules import Gradients, rule

_WIDE = 64  # columns from which on a product for each B is faster than moving them side by side


@rule("Gemm")
def gemm(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    """Gradients of α A' B' + β C, with A' and B' transposed or not."""
    (gradient,), (a, b) = gradients, node.input[:2]
    assert gradient is not None
    given = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0, **attributes(node)}
    alpha, trans_a, trans_b = given["alpha"], given["transA"], given["transB"]
    grad_a = grad_b = grad_c = None
    if a in graph.wanted:
        left, right = (b, gradient) if trans_a else (gradient, b)
        grad_a = graph.op(
            "Gemm", left, right, alpha=alpha, transA=trans_a * trans_b, transB=int(trans_a or not trans_b)
        )
    if b in graph.wanted:
        left, right = (gradient, a) if trans_b else (a, gradient)
        grad_b = graph.op(
            "Gemm", left, right, alpha=alpha, transA=int(trans_b or not trans_a), transB=trans_a * trans_b
        )
    if len(node.input) > 2 and node.input[2] in graph.wanted:
        grad_c = graph.sum_to(gradient, graph.shape(node.output[0]), graph.shape(node.input[2]))
        if given["beta"] != 1:
            grad_c = graph.op("Mul", grad_c, graph.scalar(given["beta"]))
    return [grad_a, grad_b, grad_c]


@rule("MatMul")
def matmul(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    (gradient,), (a, b) = gradients, node.input
    assert gradient is not None
    if 1 in (len(graph.shape(a)), len(graph.shape(b))):
        return _grad_vectors(graph, gradient, a, b, node.output[0])
    grad_a = _grad_left(graph, gradient, a, b, node.output[0]) if a in graph.wanted else None
    grad_b = _grad_right(graph, gradient, a, b, node.output[0]) if b in graph.wanted else None
    return [grad_a, grad_b]


@rule("Einsum")
def einsum(graph: Graph, node: NodeProto, gradients: Gradients) -> Gradients:
    """Gradient of each operand as another Einsum: of the gradient and the other operands, to the operand's indices.

    Two more kinds of operands make up for what that lacks: ones for an index that the operand sums over alone, and a
    unit matrix between the places of an index that it repeats.
    """
    (gradient,) = gradients
    assert gradient is not None
    terms, result = _einsum_terms(graph, node)
    found: list[str | None] = []
    for number, (name, term) in enumerate(zip(node.input, terms, strict=True)):
        if name not in graph.wanted:
            found.append(None)
            continue
        indices = [result, *terms[:number], *terms[number + 1 :]]
        values = [gradient, *node.input[:number], *node.input[number + 1 :]]
        target = ""
        for index, size in zip(term, graph.shape(name), strict=True):
            place = next(_unused("".join([*terms, *indices, target]))) if index in target else index
            target += place
            alone = place == index and not any(index in other for other in indices)
            if place != index or alone:
                (entries,) = static([size], "indices of an Einsum that one operand repeats or sums over alone and")
                values.append(graph.array(np.ones(entries, np.float32) if alone else np.eye(entries, dtype=np.float32)))
                indices.append(index if alone else index + place)
        found.append(graph.op("Einsum", *values, equation=f"{','.join(indices)}->{target}"))
    return found


def _einsum_terms(graph: Graph, node: NodeProto) -> tuple[list[str], str]:
    """Indices of each operand and of the result, one letter for each axis.

    Raises:
        NotImplementedError: An axis is broadcast.
    """
    equation = attributes(node)["equation"].replace(" ", "")
    operands, arrow, result = equation.partition("->")
    terms = operands.split(",")
    if not arrow:  # the result has the indices that occur once
        once = sorted(letter for letter in set(operands) - {",", "."} if operands.count(letter) == 1)
        result = ("..." if "..." in operands else "") + "".join(once)
    ranks = [len(graph.shape(name)) for name in node.input]
    counts = [rank - len(term) + 3 for rank, term in zip(ranks, terms, strict=True) if "..." in term]
    letters = "".join(itertools.islice(_unused(equation), max(counts, default=0)))
    terms = [
        term.replace("...", letters[len(letters) - (rank - len(term) + 3) :])
        for rank, term in zip(ranks, terms, strict=True)
    ]
    sizes: dict[str, Dim] = {}
    for name, term in zip(node.input, terms, strict=True):
        for letter, size in zip(term, graph.shape(name), strict=True):
            if sizes.setdefault(letter, size) != size:
                raise NotImplementedError(f"an Einsum {equation} that broadcasts an operand")
    return terms, result.replace("...", letters)


def _unused(equation: str) -> Iterator[str]:
    """Letters that an equation doesn't use."""
    return (letter for letter in string.ascii_letters if letter not in equation)


def _grad_vectors(graph: Graph, gradient: str, a: str, b: str, y: str) -> Gradients:
    """Gradients as products of matrices: a vector on the left is [1, K], one on the right [K, 1]."""
    matrices, ends, added = [a, b], list(graph.shape(y)), []
    for index, (name, axis) in enumerate(((a, 0), (b, 1))):
        if len(graph.shape(name)) == 1:
            matrices[index] = graph.op("Unsqueeze", name, graph.ints(axis))
            shape = list(graph.shape(name))
            shape.insert(axis, 1)
            graph.set_shape(matrices[index], tuple(shape))
            added.append(len(ends) - (1 if axis == 0 and len(graph.shape(b)) > 1 else 0))
            ends.insert(added[-1], 1)
    whole = graph.name("MatMul")
    graph.set_shape(whole, tuple(ends))
    lifted = graph.op("Unsqueeze", gradient, graph.ints(*added))
    left, right = matrices
    grad_a = graph.reshape_like(_grad_left(graph, lifted, left, right, whole), a) if a in graph.wanted else None
    grad_b = graph.reshape_like(_grad_right(graph, lifted, left, right, whole), b) if b in graph.wanted else None
    return [grad_a, grad_b]


def _grad_left(graph: Graph, gradient: str, a: str, b: str, y: str) -> str:
    """Gradient of A, gradient Bᵀ; where one A [M, K] meets many narrow B [..., K, N], one product over all of them."""
    rank_a, shape_b = len(graph.shape(a)), graph.shape(b)
    static_b = not any(isinstance(dim, Batch) for dim in shape_b)
    if rank_a == 2 and len(shape_b) == 3 and static_b and shape_b[2] < _WIDE:  # type: ignore[operator]
        rows, inner, columns = graph.shape(a)[0], shape_b[1], shape_b[0] * shape_b[2]  # type: ignore[operator]
        left = graph.reshape(graph.transpose(gradient, [1, 0, 2]), [rows, columns])
        right = graph.reshape(graph.transpose(b, [1, 0, 2]), [inner, columns])
        return graph.op("Gemm", left, right, transB=1)
    if rank_a == len(shape_b) == 2:
        return graph.op("Gemm", gradient, b, transB=1)
    product = graph.op("MatMul", gradient, _swap_last(graph, b))
    return graph.sum_to(product, (*graph.shape(y)[:-1], shape_b[-2]), graph.shape(a))


def _grad_right(graph: Graph, gradient: str, a: str, b: str, y: str) -> str:
    """Gradient of B, Aᵀ gradient; where many A [..., M, K] meet one B [K, N], a single product over all of them."""
    shape_a, shape_b = graph.shape(a), graph.shape(b)
    many = len(shape_a) > 2 and len(shape_b) == 2 and not any(isinstance(dim, Batch) for dim in shape_b)
    if many:
        a, gradient = (
            graph.reshape(value, [Batch(), size]) for value, size in zip((a, gradient), shape_b, strict=True)
        )
    if many or len(shape_a) == len(shape_b) == 2:
        return graph.op("MatMul", _swap_last(graph, a, 2), gradient)  # a Gemm would be fused with a Transpose after it
    product = graph.op("MatMul", _swap_last(graph, a), gradient)
    return graph.sum_to(product, (*graph.shape(y)[:-2], shape_b[-2], shape_b[-1]), shape_b)


def _swap_last(graph: Graph, value: str, rank: int | None = None) -> str:
    rank = len(graph.shape(value)) if rank is None else rank
    return graph.transpose(value, [*range(rank - 2), rank - 1, rank - 2])
