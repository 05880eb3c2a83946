"""`export_bundle`: the whole way from a PyTorch model to a verified bundle."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from export.forward.graph import INPUT, LABEL, OUTPUT, ForwardGraph, forward_graph
from export.forward.preprocess import TORCH_DTYPES, Deployed, InputDtype
from export.step.training_step import StepSpec, write_steps
from export.step.weight_update import CORRECTION, optimizer_constants
from export.trials import Batch, Trial, try_onnxruntime, try_ort_training
from export.verify import Verification, check_parameters, verify
from fedpara_edge.codecs import find_encoder
from fedpara_edge.errors import InputError
from fedpara_edge.factors.layout import Layout
from fedpara_edge.factors.roles import keep_personal
from fedpara_edge.formats.bundle import (
    ENGINES,
    INITIAL_PERSONAL,
    MANIFEST,
    WEIGHTS,
    ArraySpec,
    Bundle,
    Loss,
    Manifest,
    open_bundle,
    write_initial_personal,
    write_manifest,
)
from fedpara_edge.formats.weights import Weights, write_weights
from fedpara_edge.nn import layout_of
from fedpara_edge.storage.atomic import check_output, replacing_folder, sha256_of

_VERIFICATION_BATCHES = 20
_LARGEST_LOSS = 0.5  # of an initial tensor: beyond it, whole rows of factors may become zero, which never train
_EXAMPLES = 4  # batch of the tracing and of the verification; torch.export would fix a batch of 0 or 1


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What a bundle needs to know beyond the model.

    Args:
        name: of the model, for people.
        input_shape: of one raw example, e.g. (1, 28, 28).
        input_dtype: of the raw input: `uint8` (scaled to [0, 1] in the graph), `float32`, or `int64` tokens.
        tokens: for `int64` input, how many different tokens there are.
        mean: subtracted from the (scaled) input, one number or one for each channel.
        std: then divided by, likewise.
        loss: `cross_entropy` over outputs [B, C] and labels int64 [B], or [B, C, T] and [B, T] for a label at each of T
            positions; `mse` or `bce` (with logits) over float32 labels of the outputs' shape.
        optimizer: see `export.step.weight_update.optimizer_constants`.
        batch_size: of the training that the graphs are made for; any other works as well.
        personal: patterns of the layers or tensors that stay on the device (`fedpara_edge.factors.roles`).
        engines: names of the engines to write files for.
        initial_codec: how round 0 is stored (`fedpara_edge.codecs`).
        seed: of the batches used for verification.
    """

    name: str
    input_shape: tuple[int, ...]
    input_dtype: InputDtype = "uint8"
    tokens: int | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    loss: Loss = "cross_entropy"
    optimizer: dict[str, Any] = field(default_factory=lambda: optimizer_constants("sgd"))
    batch_size: int = 32
    personal: tuple[str, ...] = ()
    engines: tuple[str, ...] = ENGINES
    initial_codec: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch size: expected an integer of at least 1, found {self.batch_size}")
        if not self.engines or not set(self.engines) <= set(ENGINES):
            raise InputError(
                f"engines: expected some of {', '.join(ENGINES)}, found {', '.join(self.engines) or 'none'}"
            )
        if CORRECTION in self.optimizer and "ort-training" in self.engines:
            raise InputError(
                "engines: expected onnxruntime alone with a Jacobian correction, found ort-training, which can't take "
                "second derivatives; export with --engine onnxruntime"
            )
        if not self.input_shape or min(self.input_shape) < 1:
            raise InputError(f"input shape: expected positive sizes such as 1,28,28, found {list(self.input_shape)}")
        if (self.input_dtype == "int64") != (self.tokens is not None):
            raise InputError(
                f"tokens: expected with input dtype int64 and only then, found {self.tokens} for {self.input_dtype}"
            )


def export_bundle(
    model: nn.Module, folder: Path, options: ExportOptions, *, overwrite: bool = False
) -> tuple[Bundle, dict[str, Verification]]:
    """Write a bundle that trains `model`, after verifying it against torch.

    Args:
        model: any module; factorized layers (`fedpara_edge.nn`) keep their factors. Its parameters become round 0, as
            `options.initial_codec` leaves them.
        folder: the bundle to write; appears whole or not at all.
        options: input, loss and optimizer.
        overwrite: replace an existing bundle.

    Returns:
        The bundle, and by engine the relative errors that were measured.

    Raises:
        InputError: the model, the options or the folder does not fit; an operator has no gradient.
        FedparaError: the verification failed, or the disk refuses the write.
    """
    check_output(folder, overwrite=overwrite, folder=True)
    _check_replaceable(folder)
    layout = layout_of(model)
    if not layout.shared:
        raise InputError("model: expected trainable parameters, found none; nothing would travel")
    layout = keep_personal(layout, options.personal)
    deployed = Deployed(
        copy.deepcopy(model),  # tracing switches modes
        input_dtype=options.input_dtype,
        input_shape=options.input_shape,
        mean=options.mean,
        std=options.std,
    )
    example = _random_input(options, np.random.default_rng(options.seed))
    graph = forward_graph(
        deployed, example, batch_size=options.batch_size, contracting=CORRECTION not in options.optimizer
    )
    label = _label_spec(options.loss, graph.output_shape)
    trained = layout.with_role("shared", "personal")
    check_parameters(graph, trained)
    tensors = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    with replacing_folder(folder) as making:
        trials = _write_engines(making, graph, example, layout, options, label, tensors)
        verification = verify(
            trials,
            deployed,
            loss=options.loss,
            optimizer=options.optimizer,
            batches=_random_batches(options, label),
        )
        write_initial_personal(making, {tensor.name: tensors[tensor.name] for tensor in layout.with_role("personal")})
        local = sha256_of(making / INITIAL_PERSONAL) if (making / INITIAL_PERSONAL).exists() else None
        manifest = _manifest(options, layout, graph, label, local)
        initial = {tensor.name: tensors[tensor.name] for tensor in layout.shared}
        stored = write_weights(
            making / WEIGHTS, Weights(manifest.fingerprint, 0, layout, initial), find_encoder(options.initial_codec)
        )
        for name, tensor in stored.tensors.items():
            left = np.linalg.norm(tensor - initial[name])
            if left > _LARGEST_LOSS * np.linalg.norm(initial[name]):
                raise InputError(
                    f"initial codec {options.initial_codec}: expected every tensor within {_LARGEST_LOSS} of its norm, "
                    f"found {name!r} {left / np.linalg.norm(initial[name]):.2f} away; use int4, or a finer codec"
                )
        write_manifest(making, manifest)
    return open_bundle(folder), verification


def _write_engines(
    folder: Path,
    graph: ForwardGraph,
    example: torch.Tensor,
    layout: Layout,
    options: ExportOptions,
    label: ArraySpec,
    tensors: dict[str, NDArray[Any]],
) -> dict[str, Trial]:
    """Write the files of every engine asked for, and return how to try them."""
    trials: dict[str, Trial] = {}
    trained = layout.with_role("shared", "personal")
    if "ort-training" in options.engines:
        from export.artifacts import write_artifacts

        names = [tensor.name for tensor in trained]
        write_artifacts(graph, folder, trainable=names, loss=options.loss, optimizer=options.optimizer)
        trials["ort-training"] = partial(try_ort_training, folder, graph, trained)
    if "onnxruntime" in options.engines:
        spec = StepSpec(trained, label, options.loss, options.optimizer, layout)
        write_steps(graph, folder, spec, example.numpy())
        trials["onnxruntime"] = partial(try_onnxruntime, folder, trained, tensors, options.optimizer)
    return trials


def _check_replaceable(folder: Path) -> None:
    if folder.exists() and not (folder / MANIFEST).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: expected a bundle to replace, found something else; choose another name")


def _manifest(
    options: ExportOptions, layout: Layout, graph: ForwardGraph, label: ArraySpec, local: str | None
) -> Manifest:
    return Manifest(
        model=options.name,
        layout=layout,
        input=ArraySpec(INPUT, options.input_shape, options.input_dtype, options.tokens),
        label=label,
        output=ArraySpec(OUTPUT, graph.output_shape, "float32"),
        loss=options.loss,
        optimizer=options.optimizer,
        engines=options.engines,
        graph=graph.digest({tensor.name for tensor in layout.with_role("shared", "personal")}),
        local=local,
        files={},
    )


def _label_spec(loss: Loss, output_shape: Sequence[int]) -> ArraySpec:
    if loss != "cross_entropy":
        return ArraySpec(LABEL, tuple(output_shape), "float32")
    if not output_shape:
        raise InputError(
            "loss cross_entropy: expected outputs [batch, classes], or [batch, classes, positions] for a label at each "
            "position, found [batch]; choose another loss"
        )
    return ArraySpec(LABEL, tuple(output_shape[1:]), "int64", output_shape[0])


def _random_batches(options: ExportOptions, label: ArraySpec) -> Iterator[Batch]:
    for number in range(_VERIFICATION_BATCHES):
        generator = np.random.default_rng([options.seed, number])
        yield _random_input(options, generator), _random_labels(label, generator)


def _random_input(options: ExportOptions, generator: np.random.Generator) -> torch.Tensor:
    shape = (_EXAMPLES, *options.input_shape)
    if options.input_dtype == "float32":
        return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
    limit = 256 if options.tokens is None else options.tokens
    return torch.from_numpy(generator.integers(0, limit, shape)).to(TORCH_DTYPES[options.input_dtype])


def _random_labels(label: ArraySpec, generator: np.random.Generator) -> torch.Tensor:
    if label.classes is not None:
        return torch.from_numpy(generator.integers(0, label.classes, (_EXAMPLES, *label.shape)))
    return torch.from_numpy(generator.random((_EXAMPLES, *label.shape), dtype=np.float32))
