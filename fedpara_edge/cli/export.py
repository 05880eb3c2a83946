"""`fedpara-edge export`: a PyTorch model to a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from device_runtime.sources import Reading
from fedpara_edge.cli.command import Command
from fedpara_edge.cli.options import PATH, options_of
from fedpara_edge.cli.output import emit, megabytes, output_options, steps_shown
from fedpara_edge.formats.bundle import ENGINES
from fedpara_edge.formats.interface import Interface
from fedpara_edge.formats.recipe import Recipe
from fedpara_edge.storage.arrayfile import open_arrays

RANGE_ROWS = 512
"""Rows of an example whose values are told."""


@click.command("export", cls=Command)
@click.argument("model")
@click.option("-o", "--output", type=PATH, required=True, help="Bundle folder to write.")
@options_of(Recipe, without=("name",))
@options_of(Reading, into="reading")
@output_options
def command(
    model: str,
    output: Path,
    options: Mapping[str, Any],
    reading: Mapping[str, Any],
    overwrite: bool,
    json: bool,
) -> None:
    """Factor MODEL and write a bundle that devices train.

    MODEL is mlp, cnn, vgg16, resnet18, char-lstm or har-transformer, or package.module:factory or file.py:factory, a
    function without arguments that returns your nn.Module.
    """
    from fedpara_edge.cli.installed import engines, require, require_engine
    from fedpara_edge.simulation.bundles import with_example_as_arrays

    require("export")
    for engine in options.get("engines") or ():
        require_engine(engine)
    installed = tuple(name for name in ENGINES if name in engines())
    possible = {} if len(installed) == len(ENGINES) else {"engines": installed}
    recipe = Recipe(name=model, **{**possible, **options})
    recipe = with_example_as_arrays(recipe, Reading(**reading))
    with steps_shown() as on_step:
        on_step("importing torch")
        from export import make_bundle

        made = make_bundle(recipe, output, overwrite=overwrite, on_step=on_step)
    layout = made.bundle.manifest.layout
    frozen = layout.frozen_parameters
    whole = layout.dense_parameters + frozen
    result = {
        "bundle": output,
        "fingerprint": made.bundle.manifest.fingerprint,
        "shared_parameters": layout.shared_parameters,
        "dense_parameters": layout.dense_parameters,
        "frozen_parameters": layout.frozen_parameters,
        "verification": {name: vars(errors) for name, errors in made.verification.items()},
        "left_out": made.left_out,
        "layers": [
            {
                "name": layer.name,
                "kind": layer.spec.kind if layer.spec else None,
                "rank": layer.spec.rank if layer.spec else None,
                "reason": layer.reason,
                "entries": layer.entries,
                "entries_after": layer.entries_after,
                "relative_error": layer.relative_error,
            }
            for layer in made.report.layers
        ],
        "vectors": made.report.vectors,
        "vectors_after": made.report.vectors_after,
        "messages": list(made.report.messages),
        "pretrained": None if made.pretrained is None else asdict(made.pretrained),
        "fidelity": None if made.fidelity is None else asdict(made.fidelity),
        "warning": made.report.warning or None,
        "forms": list(made.bundle.manifest.forms),
        "stable_rates": None if made.rates is None else asdict(made.rates),
    }
    verified = [
        f"{output}: {name} verified against torch: loss {errors.loss:.1e}, gradients {errors.gradient:.1e}, "
        f"outputs {errors.outputs:.1e}"
        + ("" if errors.step is None else f", {recipe.optimizer} step {errors.step:.1e}")
        + " (relative)"
        + (f"; rounding to float32 makes {errors.rounding:.1e} of torch itself" if errors.rounding else "")
        for name, errors in made.verification.items()
    ]
    text = "\n".join(
        [
            *([] if made.pretrained is None else [str(made.pretrained)]),
            str(made.report),
            *([] if made.fidelity is None else [str(made.fidelity)]),
            *(_ranges(recipe.example, made.bundle.interface) if recipe.example is not None else []),
            *_positions(made.bundle.interface),
            *verified,
            *([] if made.rates is None else [f"{made.rates}{_way_out(made.rates.falls_short, recipe)}"]),
            *(_forms(made.bundle.manifest.forms) if recipe.tunable else []),
            *(f"{output}: without the engine {name}: {reason}" for name, reason in made.left_out.items()),
            f"an update sends {megabytes(4 * layout.shared_parameters)}, {layout.shared_parameters / whole:.1%} of the "
            f"dense model's {megabytes(4 * whole)}"
            + (f", of which {megabytes(4 * frozen)} are frozen, neither trained nor sent" if frozen else ""),
        ]
    )
    emit(result, text, as_json=json)


def _forms(forms: Sequence[str]) -> list[str]:
    """Line on the forms of the training step."""
    if len(forms) > 1:
        return [f"forms of the training step for train --tune: {', '.join(forms)}"]
    return ["the training step has a single form, as no convolution of the model has another"] if forms else []


def _way_out(falls_short: bool, recipe: Recipe) -> str:
    as_dense = recipe.init == "own" or recipe.pretrained is not None
    return "; export with --init own to start as the dense model does" if falls_short and not as_dense else ""


def _positions(interface: Interface) -> list[str]:
    """Lines on labels at several positions, which show if the classes are along another axis than they must."""
    return [
        f"a label at each of {' x '.join(map(str, head.label.shape))} positions, of {head.label.classes} classes along "
        f"axis 1 of the outputs {['N', *head.output.shape]}; if the classes come last, use .movedim(-1, 1)".replace(
            "'", ""
        )
        for head in interface.heads
        if head.label.classes is not None and head.label.shape
    ]


def _ranges(example: Path, interface: Interface) -> list[str]:
    """Lines on the values of the example's inputs, by which a wrong scale and a missing normalization show."""
    lines = []
    for name, array in open_arrays(example, (), optional=[spec.name for spec in interface.inputs]).items():
        if array.dtype.kind not in "uf":
            continue
        rows = np.asarray(array[:RANGE_ROWS], np.float64) / (255 if array.dtype == np.uint8 else 1)
        scaled = " as the graph scales it" if array.dtype == np.uint8 else ""
        lines.append(
            f"{name}: {array.dtype.name} {[*array.shape[1:]]}, from {rows.min():.4g} to {rows.max():.4g}, mean "
            f"{rows.mean():.4g}, standard deviation {rows.std():.4g}{scaled}; --mean and --std normalize it"
        )
    return lines
