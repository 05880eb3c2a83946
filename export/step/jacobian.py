"""Jacobian correction: steps on factors are drawn towards where a step on the composed weight would lead.

For a layer with factors u, its weight W = c(u), G = ∂L/∂W and the step's learning rate η,

    g(u) = (∂c/∂u)ᵀ G                              the gradient of the factors
    R(u) = λ/2 ‖c(u - η g(u)) - c(u) + η G‖²       how far a step of SGD on u leads from W - η G

The gradient of R with respect to all trained factors of the layer, with G held constant, is added to that of the loss,
as if ΣR over the layers were part of the loss: before the affine term and clipping, whatever the optimizer.

c(u) is computed by nodes of the forward pass. Their gradient g(u) is differentiated once more, by the same rules, which
is why G has to be that of the whole batch: the correction of a sum is not the sum of corrections.

Source: FedPara (arXiv 2108.06098v3), supplement; λ is 1 for its VGG16. Its Table 4 finds no effect beyond chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import onnx
import torch
from onnx import NodeProto, TensorProto, helper

from export.forward.graph import OPSET
from export.gradients import Graph, differentiate
from export.gradients.builder import initializers_of, needed, static
from export.step.composed import ComposedWeight
from fedpara_edge.factors.compose import compose
from fedpara_edge.nn import FactoredLayer


def append_correction(
    graph: Graph,
    nodes: Sequence[NodeProto],
    weight: ComposedWeight,
    gradients: Mapping[str, str],
    *,
    strength: float,
    learning_rate: str,
) -> dict[str, str]:
    """Append the gradient of R with respect to the factors of one layer.

    Args:
        graph: Graph that already has the forward pass and its gradient.
        nodes: Nodes of the forward pass, in order of execution.
        weight: Composed weight of the layer.
        gradients: Names of the gradients of the loss, by value; those of `weight.values` are used.
        strength: Strength λ of the correction.
        learning_rate: Name of the learning rate η.

    Returns:
        Names of the corrections to add to the gradients of the factors, by factor.

    Raises:
        NoGradientError: A node that composes the weight has no gradient, or a node of its gradient has none.
    """
    value, grad_values = weight.values[0], [gradients[name] for name in weight.values if name in gradients]
    grad_weight = graph.op("Sum", *grad_values) if len(grad_values) > 1 else grad_values[0]
    composing, start = needed(nodes, [value]), len(graph.nodes)
    grad_factors = differentiate(graph, composing, {value: grad_weight}, weight.factors)
    moved = {
        name: graph.op("Sub", name, graph.op("Mul", gradient, learning_rate)) for name, gradient in grad_factors.items()
    }
    change = graph.op("Sub", _append_copies(graph, composing, moved)[value], value)
    distance = graph.op("Add", change, graph.op("Mul", grad_weight, learning_rate))
    path = [*composing, *graph.nodes[start:]]
    graph.set_shape(grad_weight, weight.layer.shape)
    graph.set_shape(learning_rate, ())
    _infer_shapes(graph, path, [*weight.factors, grad_weight, learning_rate])
    grad_distance = graph.op("Mul", distance, graph.scalar(strength))
    return differentiate(graph, path, {distance: grad_distance}, weight.factors)


@contextmanager
def recording_weights(model: torch.nn.Module) -> Iterator[dict[FactoredLayer, list[torch.Tensor]]]:
    """Record the weights that the factored layers of a model compose meanwhile, by layer."""
    composed: dict[FactoredLayer, list[torch.Tensor]] = {}

    def recording(layer: FactoredLayer) -> Callable[[], torch.Tensor]:
        def record() -> torch.Tensor:
            composed.setdefault(layer, []).append(type(layer).compose(layer))
            return composed[layer][-1]

        return record

    layers = [module for module in model.modules() if isinstance(module, FactoredLayer) and module.spec.kind != "dense"]
    for layer in layers:
        layer.compose = recording(layer)  # type: ignore[method-assign]
    try:
        yield composed
    finally:
        for layer in layers:
            del layer.compose


def corrections_in_torch(
    loss: torch.Tensor,
    weights: Mapping[FactoredLayer, Sequence[torch.Tensor]],
    *,
    strength: float,
    learning_rate: float | torch.Tensor,
) -> dict[torch.Tensor, torch.Tensor]:
    """Gradient of R with respect to all trained factors, in torch, as a reference.

    Args:
        loss: Loss L, with its autograd graph retained.
        weights: Weights recorded by `recording_weights` while the loss was computed.
        strength: Strength λ of the correction.
        learning_rate: Learning rate η.
    """
    corrections: dict[torch.Tensor, torch.Tensor] = {}
    for layer, composed in weights.items():
        factors = layer.factors()
        trained = {part: factor for part, factor in factors.items() if factor.requires_grad}
        if not trained:
            continue
        grad_weights = torch.autograd.grad(loss, list(composed), retain_graph=True, materialize_grads=True)
        grad_weight, weight = torch.stack(grad_weights).sum(0), compose(layer.spec, factors, torch.tanh)
        grad_factors = torch.autograd.grad(weight, list(trained.values()), grad_weight, create_graph=True)
        moved = {part: trained[part] - learning_rate * g for part, g in zip(trained, grad_factors, strict=True)}
        distance = compose(layer.spec, {**factors, **moved}, torch.tanh) - weight + learning_rate * grad_weight
        penalty = strength / 2 * distance.square().sum()
        grad_penalty = torch.autograd.grad(penalty, list(trained.values()))
        corrections |= dict(zip(trained.values(), grad_penalty, strict=True))
    return corrections


def _append_copies(graph: Graph, nodes: Sequence[NodeProto], renamed: Mapping[str, str]) -> dict[str, str]:
    """Append copies of some nodes that read other values in place of some; return the new names, outputs included."""
    names = dict(renamed)
    for node in nodes:
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [names.get(name, name) for name in node.input]
        copy.output[:] = [graph.name(node.op_type) for _ in node.output]
        copy.name = copy.output[0]
        names |= dict(zip(node.output, copy.output, strict=True))
        graph.nodes.append(copy)
    return names


def _infer_shapes(graph: Graph, nodes: Sequence[NodeProto], inputs: Sequence[str]) -> None:
    """Record the shapes of the values of some nodes, none of which grows with the batch, from those of their inputs."""
    shapes = {name: static(graph.shape(name), "factors") for name in inputs}
    described = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    proto = helper.make_graph(nodes, "correction", described, [], initializers_of(nodes, graph.initializers))
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", OPSET)])
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    for value in inferred.graph.value_info:
        dims = value.type.tensor_type.shape.dim
        if all(dim.HasField("dim_value") for dim in dims):
            graph.set_shape(value.name, tuple(dim.dim_value for dim in dims))
