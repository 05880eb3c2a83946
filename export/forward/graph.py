"""Export of a PyTorch model to the ONNX graph of its forward pass, ready to be differentiated."""

from __future__ import annotations

import ast
import copy
import hashlib
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from export.complaints import gist, obstacle
from export.forward.batchnorm import new_statistics
from export.forward.contraction import contract_layers
from export.forward.masks import masks_unread
from export.forward.preprocess import Deployed
from export.forward.translations import TRANSLATIONS
from fedpara_edge.errors import InputError
from fedpara_edge.nn.batchnorm import RunningNorm, normalize_by_batches

OPSET = 18
IR_VERSION = 10  # the newest that onnxruntime-training 1.19.2 reads
INPUT, LABEL = "x", "y"
"""Names of the input and the label of a model with one of each."""
_SCOPES = "pkg.torch.onnx.name_scopes"
_TRUE = "training_mode"
_OUTPUTS_NEEDED = {"Dropout": 2, "MaxPool": 2, "LayerNormalization": 3}


@dataclass(frozen=True)
class ForwardGraph:
    """Forward pass as an ONNX graph.

    Attributes:
        model: Model of opset 18 and IR 10 with a dynamic batch; parameters are initializers under their own names.
        module_of: Module that each node came from, by the node's name.
        outputs: Shapes of the outputs of one example, by name.
        evaluation: Forward pass in evaluation, if that is another than `model` without its Dropouts: where the model
            draws at random in ways of its own; else None.
    """

    model: onnx.ModelProto
    module_of: dict[str, str]
    outputs: Mapping[str, tuple[int, ...]]
    evaluation: onnx.ModelProto | None = None

    def place_of(self, node: str) -> str:
        """Name of a node's place for errors: the module that it came from, or else the node itself."""
        module = self.module_of.get(node)
        if module is None:
            return f"node {node!r}"
        return f"module {module!r}" if module else "the model"

    @cached_property
    def statistics(self) -> dict[str, str]:
        """Values that hold the running statistics after a batch, by tensor."""
        return new_statistics(self.model)

    def takes(self, name: str) -> bool:
        """Whether a value is an input of the graph."""
        return any(info.name == name for info in self.model.graph.input)

    def digest(self, changing: Collection[str]) -> str:
        """SHA-256 of the graph without the values of the tensors that training changes."""
        bare = onnx.ModelProto()
        bare.CopyFrom(self.model)
        for tensor in bare.graph.initializer:
            if tensor.name in changing:
                tensor.ClearField("raw_data")
        return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()


def forward_graph(
    model: Deployed, example: Mapping[str, torch.Tensor], *, batch_size: int = 32, contracting: bool = True
) -> ForwardGraph:
    """Export `model` in training mode (dropout stays) with a dynamic batch.

    Args:
        model: Model with its preprocessing.
        example: Raw input batches [B, ...] with B > 1, by the names that they get in the graph, in the model's order.
        batch_size: Batch size of the training, which decides whether linear layers are contracted or composed.
        contracting: Whether linear layers may be contracted.

    Raises:
        InputError: The model does not run on the example, does not return the chosen tensors with the batch first,
            fixes the batch size, or uses BatchNorm, `torch.no_grad()`, random numbers that are neither uniform nor
            normal nor of two values, or an operator without an ONNX translation.
    """
    _refuse_modules(model.model)
    inputs = tuple(example.values())
    shapes = _output_shapes(model, inputs)
    if contracting:
        contract_layers(model, inputs, batch_size)
    if not model.model.training:  # the wrapper is new, and always in training mode
        model.train()
    normalize_by_batches(model)
    names = _names(model.model, {*example, *shapes})
    graph = finish(_exported(model, example, shapes), shapes, names)
    _refuse_random(graph)
    if not any(node.op_type in DRAWING for node in graph.model.graph.node):
        return graph
    evaluated = finish(_exported(copy.deepcopy(model).eval(), example, shapes), shapes, names)
    for node in evaluated.model.graph.node:
        if node.op_type in DRAWING:
            raise InputError(
                f"{evaluated.place_of(node.name)}: expected random numbers in training only, found {node.op_type} in "
                "evaluation; draw them if self.training (nothing was written)"
            )
    return replace(graph, evaluation=evaluated.model)


def _exported(
    model: Deployed, example: Mapping[str, torch.Tensor], outputs: Mapping[str, tuple[int, ...]]
) -> onnx.ModelProto:
    """Graph of a model, in the mode that it is in."""
    try:
        with quiet_stderr(), masks_unread():
            program = torch.onnx.export(
                model,
                tuple(example.values()),
                dynamo=True,
                optimize=False,  # constant folding would compose the factors into dense weights
                opset_version=OPSET,
                input_names=list(example),
                output_names=list(outputs),
                dynamic_shapes=(({0: torch.export.Dim("batch")},) * len(example),),
                custom_translation_table=dict(TRANSLATIONS),
                verbose=False,
            )
            assert program is not None
            return program.model_proto
    except Exception as error:  # whatever goes wrong here lies in the user's model
        raise InputError(f"model: expected one that torch.onnx can export, found {obstacle(error)}") from error


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Keep what libraries write to stderr, warnings and logs of native code included, off the terminal."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as sink, redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        terminal = os.dup(2)
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


def finish(model: onnx.ModelProto, outputs: Mapping[str, tuple[int, ...]], names: Mapping[str, str]) -> ForwardGraph:
    """What torch.onnx exported, as a forward graph.

    Args:
        model: Exported model, which is changed.
        outputs: Shapes of the outputs of one example, by name.
        names: Names that parameters get in the graph.
    """
    model.ir_version = IR_VERSION
    module_of = dict(_modules(model.graph))
    _strip_metadata(model)
    _rename_parameters(model.graph, names)
    _resolve_cast_like(model)
    for node in model.graph.node:
        for index in range(len(node.output), _OUTPUTS_NEEDED.get(node.op_type, 0)):
            node.output.append(f"{node.output[0]}.{index}")
        if node.op_type == "Dropout" and len(node.input) < 3:  # without a mode it does nothing, whereas torch's drops
            node.input.extend([""] * (2 - len(node.input)) + [_TRUE])
    if any(_TRUE in node.input for node in model.graph.node):
        model.graph.initializer.append(numpy_helper.from_array(np.array(True), _TRUE))
    onnx.checker.check_model(model)
    return ForwardGraph(model, module_of, outputs)


def _output_shapes(model: Deployed, inputs: tuple[torch.Tensor, ...]) -> dict[str, tuple[int, ...]]:
    watch = _StoppedGradients()
    try:
        with torch.enable_grad(), watch:
            outputs = copy.deepcopy(model).eval().by_name(*inputs)
    except InputError:
        raise
    except Exception as error:
        taken = " and ".join(f"{x.dtype} {list(x.shape)}" for x in inputs)
        raise InputError(f"model: expected to take {taken}, found {gist(error)}; check --input-shape") from error
    for name, output in outputs.items():
        if output.dim() < 1 or len(output) != len(inputs[0]):
            which = "" if len(outputs) == 1 else f" as {name!r}"
            raise InputError(
                f"model: expected one output tensor [{len(inputs[0])}, ...]{which}, batch first, "
                f"found {list(output.shape)}"
            )
    if watch.function is not None:
        raise InputError(
            f"model: expected gradients through all it computes, found {watch.function} of trained values within "
            "torch.no_grad(), which the export would not keep; use .detach() instead (nothing was written)"
        )
    return {name: tuple(output.shape[1:]) for name, output in outputs.items()}


class _StoppedGradients(TorchFunctionMode):
    """Watcher for functions whose result depends on trained parameters but has no gradient, as gradients are disabled.

    Attributes:
        function: Name of the first such function; None if there was none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.function: str | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not torch.is_grad_enabled() and isinstance(result, torch.Tensor) and result.is_floating_point():
            values = tree_leaves((args, kwargs))
            if self.function is None and any(isinstance(v, torch.Tensor) and v.requires_grad for v in values):
                self.function = getattr(func, "__name__", str(func))
        return result


DRAWING = frozenset({"Bernoulli", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"})
"""Operators that draw at random, besides Dropout."""


def _refuse_random(graph: ForwardGraph) -> None:
    """Refuse draws that can't be made from a seed."""
    for node in graph.model.graph.node:
        if node.op_type == "Multinomial":
            raise InputError(
                f"{graph.place_of(node.name)}: expected random numbers that are uniform, normal or of two values, "
                f"found {node.op_type}; remove it (nothing was written)"
            )


def _refuse_modules(model: torch.nn.Module) -> None:
    """Refuse, by name, modules that would export but then train differently from torch."""
    shared: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            raise InputError(
                f"module {name!r}: expected no BatchNorm but what `convert` makes of it, found one; convert the model "
                "with a --batchnorm of your choice"
            )
        if isinstance(module, RunningNorm) and shared.setdefault(id(module), name) != name:
            raise InputError(
                f"module {name!r}: expected a BatchNorm that is called in one place, found that of "
                f"{shared[id(module)]!r}; give each place its own"
            )
        if _has_spectral_norm(module):
            raise InputError(
                f"module {name!r}: expected weights without spectral_norm, whose vectors every forward pass moves with "
                "no gradient, found one; use weight_norm, or leave it out"
            )
        if isinstance(module, torch.nn.LSTM) and module.proj_size:
            raise InputError(
                f"module {name!r}: expected an LSTM without projection, which ONNX has no counterpart for, found "
                f"proj_size={module.proj_size}; take hidden_size={module.proj_size}, or a Linear layer on its outputs"
            )
        if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag):
            special = [
                option
                for option in _EMBEDDING_OPTIONS
                if getattr(module, option) is not None and getattr(module, option) is not False
            ]
            if special:
                raise InputError(
                    f"module {name!r}: expected an embedding without {special[0]}, which has no counterpart in ONNX; "
                    "leave it out"
                )


def _has_spectral_norm(module: torch.nn.Module) -> bool:
    if isinstance(module, _SpectralNorm):
        return True
    return any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())


_EMBEDDING_OPTIONS = ("max_norm", "scale_grad_by_freq", "sparse")


def _modules(graph: onnx.GraphProto) -> Iterator[tuple[str, str]]:
    for node in graph.node:
        for entry in node.metadata_props:
            if entry.key == _SCOPES:
                scopes = ast.literal_eval(entry.value)  # ['', 'model', 'model.fc', 'linear']
                yield node.name, scopes[-2].removeprefix("model").lstrip(".") if len(scopes) > 1 else ""


def _strip_metadata(model: onnx.ModelProto) -> None:
    graph = model.graph
    for owner in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del owner.metadata_props[:]
        owner.doc_string = ""


def _names(model: torch.nn.Module, others: set[str]) -> dict[str, str]:
    """Name in the graph of every parameter and buffer; one that is held twice has its first name.

    Raises:
        InputError: One has the name of another value in the graph.
    """
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    names = {f"model.{name}": first.setdefault(id(tensor), name) for name, tensor in tensors}
    taken = {*others, LABEL, "loss"} & set(names.values())
    if taken:
        raise InputError(f"parameter {min(taken)!r}: expected a name that the graph does not use; rename it")
    return names


def _rename_parameters(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    renamed = {tensor.name: names[tensor.name] for tensor in graph.initializer if tensor.name in names}
    used = {name for node in graph.node for name in node.output}
    renamed |= {name: f"{name}.value" for name in used & set(renamed.values())}
    for owner in (*graph.initializer, *graph.value_info):
        owner.name = renamed.get(owner.name, owner.name)
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
        for index, name in enumerate(node.output):
            node.output[index] = renamed.get(name, name)


def _resolve_cast_like(model: onnx.ModelProto) -> None:
    """Replace CastLike, which has no gradient, with Cast, as the types are known."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {info.name: info.type.tensor_type.elem_type for info in (*graph.input, *graph.value_info, *graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in model.graph.node:
        if node.op_type == "CastLike" and types.get(node.input[1]):
            node.op_type = "Cast"
            node.attribute.append(helper.make_attribute("to", types[node.input[1]]))
            del node.input[1]
