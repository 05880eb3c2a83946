"""Scale and shift of channels in one pass over the activations, in which a Mul and an Add take two."""

from __future__ import annotations

from export.gradients.builder import Graph


def scale_and_shift(graph: Graph, value: str, slope: str, shift: str) -> str:
    """Append value · slope + shift, as a BatchNormalization by a mean of 0 and a variance of 1.

    Args:
        graph: Graph to append to.
        value: Activations [N, C, pixels].
        slope: Factor [C] of each channel.
        shift: Summand [C] of each channel; "" for none, which is a plain Mul.
    """
    if not shift:
        return graph.op("Mul", value, graph.op("Unsqueeze", slope, graph.ints(1)))
    zeros = graph.op("Mul", slope, graph.scalar(0.0))  # of as many channels, whose number may grow with the batch
    return graph.op("BatchNormalization", value, slope, shift, zeros, zeros, epsilon=1.0)
