"""Export of a PyTorch model to a verified bundle (`export_bundle`)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from export.forward.graph import INPUT, LABEL, OUTPUT, ForwardGraph, forward_graph
from export.forward.preprocess import TORCH_DTYPES, Deployed
from export.step.training_step import StepSpec, write_steps
from export.step.weight_update import CORRECTION, optimizer_constants
from export.trials import Batch, Trial, try_onnxruntime, try_ort_training
from export.verify import Verification, check_parameters, verify
from fedpara_edge.codecs import find_encoder
from fedpara_edge.errors import InputError
from fedpara_edge.factors.layout import Layout
from fedpara_edge.factors.roles import keep_personal
from fedpara_edge.formats.bundle import (
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
from fedpara_edge.formats.recipe import ExportConfig, InputDtype
from fedpara_edge.formats.weights import Weights, write_weights
from fedpara_edge.nn import layout_of
from fedpara_edge.storage.atomic import check_output, replacing_folder, sha256_of

DEFAULT_DTYPE: InputDtype = "float32"
_VERIFICATION_BATCHES = 20
_LARGEST_LOSS = 0.5  # of an initial tensor, relative: beyond it, whole rows of factors may become zero and never train
_EXAMPLES = 4  # batch size of tracing and verification; torch.export would fix a batch of 0 or 1


def export_bundle(
    model: nn.Module, folder: Path | str, config: ExportConfig, *, overwrite: bool = False
) -> tuple[Bundle, dict[str, Verification]]:
    """Write a bundle that trains `model`, after verifying it against torch.

    Args:
        model: Any module; factored layers (`fedpara_edge.nn`) keep their factors. Its parameters become round 0, as
            `config.initial_codec` leaves them.
        folder: Folder of the bundle to write, which appears whole or not at all.
        config: Input, loss, optimizer and engines.
        overwrite: Whether to replace an existing bundle.

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
    raw, optimizer = _input_spec(config), _constants(config)
    deployed = Deployed(
        copy.deepcopy(model),  # tracing switches modes
        input_dtype=config.input_dtype or DEFAULT_DTYPE,
        input_shape=raw.shape,
        mean=config.mean,
        std=config.std,
    )
    example = _random_input(raw, np.random.default_rng(config.seed))
    graph = forward_graph(deployed, example, batch_size=config.batch_size, contracting=CORRECTION not in optimizer)
    label = _label_spec(config.loss, graph.output_shape)
    trained = layout.with_role("shared", "personal")
    check_parameters(graph, trained)
    tensors = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    with replacing_folder(folder) as making:
        trials = _write_engines(making, graph, example, layout, config, label, optimizer, tensors)
        verification = verify(
            trials,
            deployed,
            loss=config.loss,
            optimizer=optimizer,
            batches=_random_batches(raw, label, config.seed),
        )
        write_initial_personal(making, {tensor.name: tensors[tensor.name] for tensor in layout.with_role("personal")})
        local = sha256_of(making / INITIAL_PERSONAL) if (making / INITIAL_PERSONAL).exists() else None
        manifest = _manifest(config, layout, graph, raw, label, optimizer, local)
        initial = {tensor.name: tensors[tensor.name] for tensor in layout.shared}
        stored = write_weights(
            making / WEIGHTS, Weights(manifest.fingerprint, 0, layout, initial), find_encoder(config.initial_codec)
        )
        for name, tensor in stored.tensors.items():
            left = np.linalg.norm(tensor - initial[name])
            if left > _LARGEST_LOSS * np.linalg.norm(initial[name]):
                raise InputError(
                    f"{config.initial_codec}: expected every tensor within {_LARGEST_LOSS} of its norm, "
                    f"found {name!r} {left / np.linalg.norm(initial[name]):.2f} away; use int4, or a finer codec",
                    key="initial_codec",
                )
        write_manifest(making, manifest)
    return open_bundle(folder), verification


def _write_engines(
    folder: Path,
    graph: ForwardGraph,
    example: torch.Tensor,
    layout: Layout,
    config: ExportConfig,
    label: ArraySpec,
    optimizer: dict[str, Any],
    tensors: dict[str, NDArray[Any]],
) -> dict[str, Trial]:
    """Write the files of every requested engine; return functions that try them, by engine."""
    trials: dict[str, Trial] = {}
    trained = layout.with_role("shared", "personal")
    if "ort-training" in config.engines:
        try:
            from export.artifacts import write_artifacts
        except ImportError as error:
            raise InputError(
                f"expected onnxruntime-training-cpu to be installed for ort-training, found none ({error}); install "
                "it, or export for the engine onnxruntime alone",
                key="engines",
            ) from error
        names = [tensor.name for tensor in trained]
        write_artifacts(graph, folder, trainable=names, loss=config.loss, optimizer=optimizer)
        trials["ort-training"] = partial(try_ort_training, folder, graph, trained)
    if "onnxruntime" in config.engines:
        spec = StepSpec(trained, label, config.loss, optimizer, layout)
        write_steps(graph, folder, spec, example.numpy())
        trials["onnxruntime"] = partial(try_onnxruntime, folder, trained, tensors, optimizer)
    return trials


def _check_replaceable(folder: Path) -> None:
    if folder.exists() and not (folder / MANIFEST).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: expected a bundle to replace, found something else; choose another name")


def _manifest(
    config: ExportConfig,
    layout: Layout,
    graph: ForwardGraph,
    raw: ArraySpec,
    label: ArraySpec,
    optimizer: dict[str, Any],
    local: str | None,
) -> Manifest:
    return Manifest(
        model=config.name,
        layout=layout,
        input=raw,
        label=label,
        output=ArraySpec(OUTPUT, graph.output_shape, "float32"),
        loss=config.loss,
        optimizer=optimizer,
        engines=config.engines,
        graph=graph.digest({tensor.name for tensor in layout.with_role("shared", "personal")}),
        local=local,
        files={},
    )


def _input_spec(config: ExportConfig) -> ArraySpec:
    dtype = config.input_dtype or DEFAULT_DTYPE
    if not config.input_shape:
        raise InputError("expected the shape of an example, such as 1,28,28, found none; give it", key="input_shape")
    if (dtype == "int64") != (config.tokens is not None):
        raise InputError(
            f"expected with input_dtype int64 and only then, found {config.tokens} for {dtype}", key="tokens"
        )
    return ArraySpec(INPUT, config.input_shape, dtype, config.tokens)


def _constants(config: ExportConfig) -> dict[str, Any]:
    given = {name: getattr(config, name) for name in ("momentum", "weight_decay", "eps")}
    constants = {name: value for name, value in given.items() if value is not None}
    if config.betas is not None:
        constants["betas"] = list(config.betas)
    return optimizer_constants(config.optimizer, jacobian_correction=config.jacobian_correction, **constants)


def _label_spec(loss: Loss, output_shape: Sequence[int]) -> ArraySpec:
    if loss != "cross_entropy":
        return ArraySpec(LABEL, tuple(output_shape), "float32")
    if not output_shape:
        raise InputError(
            "loss cross_entropy: expected outputs [batch, classes], or [batch, classes, positions] for a label at each "
            "position, found [batch]; choose another loss"
        )
    return ArraySpec(LABEL, tuple(output_shape[1:]), "int64", output_shape[0])


def _random_batches(raw: ArraySpec, label: ArraySpec, seed: int) -> Iterator[Batch]:
    for number in range(_VERIFICATION_BATCHES):
        generator = np.random.default_rng([seed, number])
        yield _random_input(raw, generator), _random_labels(label, generator)


def _random_input(raw: ArraySpec, generator: np.random.Generator) -> torch.Tensor:
    shape = (_EXAMPLES, *raw.shape)
    if raw.dtype == "float32":
        return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
    limit = 256 if raw.classes is None else raw.classes
    return torch.from_numpy(generator.integers(0, limit, shape)).to(TORCH_DTYPES[raw.dtype])


def _random_labels(label: ArraySpec, generator: np.random.Generator) -> torch.Tensor:
    if label.classes is not None:
        return torch.from_numpy(generator.integers(0, label.classes, (_EXAMPLES, *label.shape)))
    return torch.from_numpy(generator.random((_EXAMPLES, *label.shape), dtype=np.float32))
