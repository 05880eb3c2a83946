"""`fedpara-edge fold`: a bundle and weights to one inference model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from fedpara_edge.cli.command import Command
from fedpara_edge.cli.options import PATH
from fedpara_edge.cli.output import emit, megabytes, output_options
from fedpara_edge.errors import counted
from fedpara_edge.formats.folded import Precision


@click.command("fold", cls=Command)
@click.argument("bundle", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="ONNX model to write.")
@click.option("--weights", type=PATH, help="Weights to fold.  [default: the bundle's]")
@click.option("--state", type=PATH, help="State folder with a device's personal tensors.")
@click.option("--precision", type=click.Choice(get_args(Precision)), default="float32", show_default=True)
@click.option("--data", type=PATH, help="Data to measure the accuracy with, and to calibrate int8.")
@click.option(
    "--max-drop", type=float, default=1.0, show_default=True, help="Points of accuracy that may be lost on the data."
)
@output_options
def command(
    bundle: Path,
    output: Path,
    weights: Path | None,
    state: Path | None,
    precision: Any,
    data: Path | None,
    max_drop: float,
    overwrite: bool,
    json: bool,
) -> None:
    """Compose the weights of BUNDLE into one ONNX model for inference, verified against the factored one."""
    from fedpara_edge.cli.installed import require

    require("fold")
    import device_runtime.engines.ort  # noqa: F401  # first, so that onnxruntime does not bring in torch
    from device_runtime.data import open_data
    from device_runtime.loading import read_personal
    from export.folding.fold import fold
    from fedpara_edge.formats.bundle import WEIGHTS, open_bundle
    from fedpara_edge.formats.weights import read_weights
    from fedpara_edge.storage.atomic import check_output

    check_output(output, overwrite=overwrite, inputs=(weights, data))
    opened = open_bundle(bundle)
    folding = fold(
        opened,
        read_weights(weights or opened.file(WEIGHTS), opened),
        output,
        personal=None if state is None else read_personal(opened, state),
        precision=precision,
        data=None if data is None else open_data(data, opened.manifest),
        max_drop=max_drop,
        overwrite=overwrite,
    )
    spec = folding.spec
    result = {
        "model": output,
        "precision": spec.precision,
        "round": spec.round,
        "fingerprint": spec.fingerprint,
        "personal": spec.personal,
        "bytes": folding.bytes,
        "layers": list(folding.layers),
        "error": folding.error,
        "examples": folding.examples,
        "accuracy": folding.accuracy,
        "factored_accuracy": folding.factored_accuracy,
    }
    inputs = counted(folding.examples, "example") if folding.examples else "random inputs"
    lines = [
        f"{output}: {spec.model}, round {spec.round}, {counted(len(folding.layers), 'layer')} composed, "
        f"{spec.precision}, "
        f"{megabytes(folding.bytes)}",
        f"its outputs differ from the factored model's by {folding.error:.1e} (relative) on {inputs}",
    ]
    if folding.accuracy is not None and folding.factored_accuracy is not None:
        lines.append(f"accuracy {folding.accuracy:.2%}, factored {folding.factored_accuracy:.2%}")
    if opened.manifest.layout.with_role("personal") and not spec.personal:
        lines.append("with the personal tensors as exported; pass --state for a device's own")
    emit(result, "\n".join(lines), as_json=json)
