"""`fedpara-edge export`: a PyTorch model to a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from fedpara_edge.cli.command import Command
from fedpara_edge.cli.options import PATH, options_of
from fedpara_edge.cli.output import emit, megabytes, output_options, steps_shown
from fedpara_edge.factors.factorization import Init
from fedpara_edge.formats.bundle import ENGINES
from fedpara_edge.formats.interface import Interface
from fedpara_edge.formats.recipe import Recipe


@click.command("export", cls=Command)
@click.argument("model")
@click.option("-o", "--output", type=PATH, required=True, help="Bundle folder to write.")
@options_of(Recipe, without=("name",))
@output_options
def command(
    model: str,
    output: Path,
    options: Mapping[str, Any],
    overwrite: bool,
    json: bool,
) -> None:
    """Factor MODEL and write a bundle that devices train.

    MODEL is mlp, cnn, vgg16, resnet18, char-lstm or har-transformer, or package.module:factory or file.py:factory, a
    function without arguments that returns your nn.Module.
    """
    from fedpara_edge.cli.installed import engines, require, require_engine

    require("export")
    for engine in options.get("engines", ()):
        require_engine(engine)
    recipe = Recipe(name=model, **{"engines": tuple(name for name in ENGINES if name in engines()), **options})
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
            *_positions(made.bundle.interface),
            *verified,
            *([] if made.rates is None else [f"{made.rates}{_way_out(made.rates.falls_short, recipe.init)}"]),
            f"an update sends {megabytes(4 * layout.shared_parameters)}, {layout.shared_parameters / whole:.1%} of the "
            f"dense model's {megabytes(4 * whole)}"
            + (f", of which {megabytes(4 * frozen)} are frozen, neither trained nor sent" if frozen else ""),
        ]
    )
    emit(result, text, as_json=json)


def _way_out(falls_short: bool, init: Init) -> str:
    return "; export with --init own to start as the dense model does" if falls_short and init != "own" else ""


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
