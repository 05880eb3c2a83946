"""Export of a PyTorch model to a verified bundle (`export_bundle`)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from export.apart import prepare
from export.batches import Batches
from export.engines import EngineWriters, Writer
from export.forward.graph import INPUT, LABEL, ForwardGraph, forward_graph
from export.forward.outputs import Chosen
from export.forward.ownloss import loaded, with_own_losses
from export.forward.preprocess import Argument, Deployed, Preprocessing
from export.reference import Reference
from export.step.training_step import INTERFACE, StepSpec, write_steps
from export.step.weight_update import CORRECTION, DECAY, optimizer_constants
from export.trials import OnnxruntimeTrial, OpenTrial, OrtTrainingTrial, SecondProcessTrial
from export.verify import Verification, check_parameters, verify, worse
from fedpara_edge.errors import InputError, counted
from fedpara_edge.factors.layout import Layout
from fedpara_edge.factors.roles import keep_personal
from fedpara_edge.formats.bundle import (
    ENGINES,
    FORMS,
    INITIAL_PERSONAL,
    MANIFEST,
    WEIGHTS,
    Bundle,
    Manifest,
    open_bundle,
    write_initial_personal,
    write_manifest,
)
from fedpara_edge.formats.drawn import Drawn
from fedpara_edge.formats.inputs import Input, find_input
from fedpara_edge.formats.interface import ArraySpec, Head, Interface
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.formats.weights import Weights, write_weights
from fedpara_edge.losses import CrossEntropy, Loss, find_head
from fedpara_edge.nn import layout_of
from fedpara_edge.storage.atomic import check_output, replacing_folder, sha256_of

_LARGEST_LOSS = 0.5  # of an initial tensor, relative: beyond it, whole rows of factors may become zero and never train
_EXAMPLES = 4  # batch size of tracing; torch.export would fix a batch of 0 or 1


def quietly(*_: str) -> None:
    """Say nothing."""


def export_bundle(
    model: nn.Module,
    folder: Path | str,
    config: ExportConfig,
    *,
    overwrite: bool = False,
    examples: Mapping[str, NDArray[Any]] | None = None,
    on_step: Callable[[str], None] = quietly,
    on_left_out: Callable[[str, str], None] = quietly,
) -> tuple[Bundle, dict[str, Verification]]:
    """Write a bundle that trains `model`, after verifying it against torch.

    Args:
        model: Any module; factored layers (`fedpara_edge.nn`) keep their factors. Its parameters become round 0, as
            `config.initial_codec` leaves them.
        folder: Folder of the bundle to write, which appears whole or not at all.
        config: Input, loss, optimizer and engines.
        overwrite: Whether to replace an existing bundle.
        examples: Real rows of inputs or labels by name, to verify with; what is missing is drawn at random.
        on_step: Function that is called with what is being done, in words.
        on_left_out: Function that is called with an engine that can't train the model and the reason, where
            `config.engines` names none.

    Returns:
        Bundle, and the measured relative errors by engine.

    Raises:
        InputError: The model, the config or the folder does not fit, or an operator has no gradient.
        FedparaError: The verification failed, or the disk refuses the write.
    """
    folder = Path(folder)
    check_output(folder, overwrite=overwrite, folder=True)
    _check_replaceable(folder)
    layout = layout_of(model)
    if not layout.shared:
        raise InputError("model: expected trainable parameters, found none; nothing would travel")
    layout = keep_personal(layout, config.personal)
    _check_updates(layout, config)
    inputs, optimizer = inputs_of(config), _constants(config)
    specs = tuple(ArraySpec(name, each.shape, each.dtype, each.tokens) for name, each in inputs.items())
    losses = {output: loaded(loss) for output, loss in map(find_head, config.loss)}
    deployed = deploy(model, config)
    batches = Batches(
        inputs=specs,
        preprocessings=[argument.preprocessing for argument in deployed.arguments],
        seed=config.seed,
        examples=examples or {},
    )
    example = {name: torch.from_numpy(array) for name, array in batches.draw(_EXAMPLES).inputs.items()}
    prepare("export.trials", *(["export.artifacts"] if _is_possible("ort-training", config) else []))
    on_step("exporting the forward pass")
    contracting = not {CORRECTION, DECAY} & optimizer.keys()
    graph = forward_graph(deployed, example, batch_size=config.batch_size, contracting=contracting)
    interface = _with_class_names(_interface(specs, [*losses.values()], graph.outputs), config.class_names)
    labels = replace(batches, heads=interface.heads).draw(_EXAMPLES).labels
    graph, heads = with_own_losses(graph, interface.heads, labels)
    interface = replace(interface, heads=heads)
    example |= {name: torch.from_numpy(array) for name, array in labels.items() if graph.takes(name)}
    check_parameters(graph, (*layout.trained, *layout.held))
    tensors = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    reference = Reference(
        deployed,
        outputs=graph.outputs,
        heads=interface.heads,
        optimizer=optimizer,
        drawing=graph.evaluation is not None,
    )
    batches = replace(batches, heads=interface.heads)
    reference.check(batches.draw(_EXAMPLES))
    verifying = partial(verify, reference=reference, graph=graph, optimizer=optimizer, batches=batches, on_step=on_step)
    writers = _writers(graph, example, layout, interface, optimizer, tensors, config.tunable, on_step)
    with replacing_folder(folder) as making:
        if config.engines is None:
            possible = [engine for engine in ENGINES if _is_possible(engine, config)]
            installed = EngineWriters({engine: writers[engine] for engine in possible}, verifying)
            verification, left_out = installed.write_possible(making)
            engines = tuple(engine for engine in possible if engine not in left_out)
            for engine, error in left_out.items():
                on_left_out(engine, str(error).removesuffix(" (nothing was written)"))
        else:
            engines = config.engines
            verification = EngineWriters(writers, verifying).write(making, engines)
        if (making / FORMS["direct"]).exists():
            on_step("verifying the direct form")
            direct = {"onnxruntime": _form("direct", layout, tensors, optimizer)}
            for engine, found in EngineWriters(direct, verifying).write(making, [*direct]).items():
                verification[engine] = worse(verification[engine], found)
        write_initial_personal(making, {tensor.name: tensors[tensor.name] for tensor in layout.with_role("personal")})
        local = sha256_of(making / INITIAL_PERSONAL) if (making / INITIAL_PERSONAL).exists() else None
        manifest = _manifest(config, engines, layout, graph, interface, optimizer, local)
        initial = {tensor.name: tensors[tensor.name] for tensor in layout.with_role("shared", "base")}
        initial |= {tensor.name: np.zeros(tensor.shape, np.float32) for tensor in layout.with_role("velocity")}
        stored = write_weights(
            making / WEIGHTS, Weights(manifest.fingerprint, 0, layout, initial), config.initial_encoder
        )
        if config.initial_codec != Drawn.name:
            _check_loss(config, initial, stored.tensors)
        write_manifest(making, manifest)
    return open_bundle(folder), verification


def _writers(
    graph: ForwardGraph,
    example: Mapping[str, torch.Tensor],
    layout: Layout,
    interface: Interface,
    optimizer: dict[str, Any],
    tensors: dict[str, NDArray[Any]],
    tunable: bool,
    on_step: Callable[[str], None],
) -> dict[str, Writer]:
    """Functions that write the files of an engine and return one that loads them to try them, by engine."""
    trained, arrays = layout.trained, {name: x.numpy() for name, x in example.items()}

    def write_ort_training(folder: Path) -> OpenTrial:
        on_step("differentiating for ort-training")
        try:
            from export.artifacts import write_artifacts
        except ImportError as error:
            raise InputError(
                f"expected onnxruntime-training-cpu to be installed for ort-training, found none ({error}); install "
                "it, or export for the engine onnxruntime alone",
                key="engines",
            ) from error
        names, held = ([tensor.name for tensor in tensors] for tensors in (trained, layout.held))
        write_artifacts(
            graph,
            folder,
            trainable=names,
            heads=interface.heads,
            optimizer=optimizer,
            examples=arrays,
            held=held,
        )
        return partial(SecondProcessTrial, OrtTrainingTrial, folder, graph, trained)

    def write_onnxruntime(folder: Path) -> OpenTrial:
        on_step("differentiating for onnxruntime")
        spec = StepSpec(trained, interface.heads, optimizer, layout, layout.statistics, layout.held, tunable)
        write_steps(graph, folder, spec, arrays)
        return _form("default", layout, tensors, optimizer)(folder)

    return {"ort-training": write_ort_training, "onnxruntime": write_onnxruntime}


def _form(name: str, layout: Layout, tensors: dict[str, NDArray[Any]], optimizer: dict[str, Any]) -> Writer:
    """Function that returns one that loads a form of the training step, which was written before."""
    return lambda folder: partial(SecondProcessTrial, OnnxruntimeTrial, folder, name, layout, tensors, optimizer)


def _is_possible(engine: str, config: ExportConfig) -> bool:
    """Whether an engine can be exported for here at all."""
    if engine != "ort-training":
        return True
    return not config.of_weights and find_spec("onnxruntime.training") is not None


def _check_loss(config: ExportConfig, initial: Mapping[str, NDArray[Any]], stored: Mapping[str, NDArray[Any]]) -> None:
    """Refuse a codec that leaves too little of an initial tensor."""
    for name, tensor in stored.items():
        left = np.linalg.norm(tensor - initial[name])
        if left > _LARGEST_LOSS * np.linalg.norm(initial[name]):
            raise InputError(
                f"{config.initial_codec}: expected every tensor within {_LARGEST_LOSS} of its norm, "
                f"found {name!r} {left / np.linalg.norm(initial[name]):.2f} away; use int4, or a finer codec",
                key="initial_codec",
            )


def _check_updates(layout: Layout, config: ExportConfig) -> None:
    """Refuse what does not go together with updates of weights."""
    if layout.held and config.jacobian_correction:
        raise InputError(
            "expected 0 for kind update, whose weights are linear in the factors so that there is nothing to correct, "
            f"found {config.jacobian_correction}; leave it out",
            key="jacobian_correction",
        )
    if layout.held and config.frobenius_decay:
        raise InputError(
            "expected 0 for kind update, whose bases are not trained, so that a decay of the weight would stay in the "
            f"factors of the round, found {config.frobenius_decay}; leave it out",
            key="frobenius_decay",
        )


def _check_replaceable(folder: Path) -> None:
    if folder.exists() and not (folder / MANIFEST).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: expected a bundle to replace, found something else; choose another name")


def _manifest(
    config: ExportConfig,
    engines: tuple[str, ...],
    layout: Layout,
    graph: ForwardGraph,
    interface: Interface,
    optimizer: dict[str, Any],
    local: str | None,
) -> Manifest:
    return Manifest(
        model=config.title,
        layout=layout,
        interface=interface,
        optimizer=optimizer,
        engines=engines,
        graph=graph.digest({tensor.name for tensor in (*layout.with_role("shared", "personal"), *layout.held)}),
        local=local,
        files={},
    )


def deploy(model: nn.Module, config: ExportConfig) -> Deployed:
    """Copy of a model behind the preprocessing of its inputs, and with the outputs that a config chooses."""
    return deploy_in_place(copy.deepcopy(model), config)  # tracing switches modes


def deploy_in_place(model: nn.Module, config: ExportConfig) -> Deployed:
    """The model itself behind the preprocessing of its inputs, and with the outputs that a config chooses."""
    arguments = [
        _argument(name, each) if config.input else Argument(None, _preprocessing(each))
        for name, each in inputs_of(config).items()
    ]
    chosen = Chosen(_output_names(config, dict(find_head(text) for text in config.loss)))
    return Deployed(model, arguments, chosen)


def inputs_of(config: ExportConfig) -> dict[str, Input]:
    """Inputs of the model by name."""
    if config.input:
        return dict(find_input(text) for text in config.input)
    if not config.input_shape:
        raise InputError("expected the shape of an example, such as 1,28,28, found none; give it", key="input_shape")
    dtype = config.input_dtype or "float32"
    if (dtype == "int64") != (config.tokens is not None):
        raise InputError(
            f"expected with input_dtype int64 and only then, found {config.tokens} for {dtype}", key="tokens"
        )
    return {INPUT: Input(shape=config.input_shape, dtype=dtype, tokens=config.tokens, mean=config.mean, std=config.std)}


def _argument(name: str, each: Input) -> Argument:
    try:
        return Argument(name, _preprocessing(each))
    except InputError as error:
        raise InputError(f"{name}: {error}", key="input") from error


def _preprocessing(each: Input) -> Preprocessing:
    return Preprocessing(each.dtype, each.shape, mean=each.mean, std=each.std)


def _output_names(config: ExportConfig, losses: Mapping[str | None, Loss]) -> tuple[str, ...]:
    """Names of the outputs to keep, those that are trained first; none for the only one."""
    trained = [name for name in losses if name is not None]
    return (*trained, *(name for name in config.output_name if name not in trained))


def _interface(
    inputs: tuple[ArraySpec, ...], losses: Sequence[Loss], outputs: Mapping[str, tuple[int, ...]]
) -> Interface:
    """Interface of a model: an output for each loss is trained, the others are only predicted."""
    specs = [ArraySpec(name, shape, "float32") for name, shape in outputs.items()]
    heads = []
    for loss, output in zip(losses, specs, strict=False):
        name = LABEL if len(losses) == 1 else f"{LABEL}_{output.name}"
        heads.append(Head(output, _label_spec(name, loss, output.shape), loss))
    names = [array.name for array in (*inputs, *(head.label for head in heads), *specs)]
    for number, name in enumerate(names):
        if name in INTERFACE or name in names[:number]:
            raise InputError(
                f"{name!r}: expected another name than those of labels ({LABEL}), outputs and what a training step "
                f"takes, found one in use; rename that argument or output of the model"
            )
    return Interface(inputs=inputs, heads=tuple(heads), others=tuple(specs[len(losses) :]))


def _with_class_names(interface: Interface, names: tuple[str, ...]) -> Interface:
    """The same with names for the classes of the first label."""
    if not names:
        return interface
    first, *others = interface.heads
    if len(names) != first.label.classes:
        found = "none" if first.label.classes is None else first.label.classes
        raise InputError(
            f"expected a name for each class of the outputs {list(first.output.shape)}, {found}, found {len(names)}: "
            f"{', '.join(names[:10])}; name them all, in their order",
            key="class_names",
        )
    return replace(interface, heads=(replace(first, label=replace(first.label, class_names=names)), *others))


def _constants(config: ExportConfig) -> dict[str, Any]:
    given = {name: getattr(config, name) for name in ("momentum", "weight_decay", "eps")}
    constants = {name: value for name, value in given.items() if value is not None}
    if config.betas is not None:
        constants["betas"] = list(config.betas)
    return optimizer_constants(
        config.optimizer,
        jacobian_correction=config.jacobian_correction,
        frobenius_decay=config.frobenius_decay,
        **constants,
    )


def _label_spec(name: str, loss: Loss, output_shape: tuple[int, ...]) -> ArraySpec:
    if loss.labels != "classes":
        return ArraySpec(name, output_shape, "float32")
    if not output_shape:
        raise InputError(
            f"loss {loss.name}: expected outputs [batch, classes], or [batch, classes, positions] for a label at each "
            "position, found [batch]; choose another loss"
        )
    classes = output_shape[0]
    if isinstance(loss, CrossEntropy) and len(loss.class_weights) not in (0, classes):
        raise InputError(
            f"{loss.name}: class_weights: expected a number for each of {counted(classes, 'class')}, found "
            f"{len(loss.class_weights)}",
            key="loss",
        )
    return ArraySpec(name, output_shape[1:], "int64", classes)
