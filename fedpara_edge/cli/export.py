"""`fedpara-edge export`: a PyTorch model to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from fedpara_edge.cli.output import emit, force_option, json_option, megabytes
from fedpara_edge.factors.layout import KINDS
from fedpara_edge.formats.bundle import ENGINES
from fedpara_edge.formats.recipe import Init, Recipe


def _numbers(kind: type[Any], what: str) -> Any:
    def parse(_: click.Context, __: click.Parameter, value: str | None) -> tuple[Any, ...] | None:
        if value is None:
            return None
        try:
            return tuple(kind(part) for part in value.split(","))
        except ValueError as error:
            raise click.BadParameter(f"expected {what}, found {value!r}") from error

    return parse


def _pairs(kind: type[Any]) -> Any:
    def parse(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
        pairs = {}
        for value in values:
            pattern, equals, number = value.rpartition("=")
            try:
                if not equals:
                    raise ValueError
                pairs[pattern] = kind(number)
            except ValueError as error:
                raise click.BadParameter(f"expected PATTERN=NUMBER, found {value!r}") from error
        return pairs

    return parse


@click.command("export")
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Bundle folder to write.")
@click.option(
    "--kind", type=click.Choice(KINDS), default="fedpara", show_default=True, help="How to factor the layers."
)
@click.option("--gamma", type=float, default=0.1, show_default=True, help="Between least (0) and largest (1) rank.")
@click.option("--gamma-of", multiple=True, metavar="PATTERN=γ", callback=_pairs(float), help="γ of some layers.")
@click.option("--rank-of", multiple=True, metavar="PATTERN=R", callback=_pairs(int), help="Rank of some layers.")
@click.option(
    "--form",
    type=click.Choice(["tensor", "matrix"]),
    default="tensor",
    show_default=True,
    help="Of convolutions: Proposition 3 or 1.",
)
@click.option("--tanh", is_flag=True, help="The variant with tanh.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Layers to factor; default all.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Layers to leave dense.")
@click.option("--personal", multiple=True, metavar="PATTERN", help="Layers or tensors that stay on the device.")
@click.option(
    "--batchnorm",
    type=click.Choice(["refuse", "group"]),
    default="refuse",
    show_default=True,
    help="What to do with BatchNorm.",
)
@click.option(
    "--init",
    type=click.Choice(get_args(Init)),
    default="composed",
    show_default=True,
    help="Draw the factors for He's variance of the composed weight, or each by He's rule with its own fan.",
)
@click.option(
    "--initial-codec",
    default="float32",
    show_default=True,
    metavar="CODEC",
    help="How weights.safetensors stores the initial weights; int4 does no harm to random ones. onnxruntime-training's "
    "files have them in float32 in any case.",
)
@click.option(
    "--pretrained", type=click.Path(path_type=Path), help="state_dict (.safetensors or .pt) to fit the factors to."
)
@click.option("--classes", type=click.IntRange(min=1), help="Classes of a zoo model.  [default: its own]")
@click.option(
    "--input-shape",
    callback=_numbers(int, "sizes such as 1,28,28"),
    metavar="SIZES",
    help="Of one example, such as 1,28,28; needed for your own model.",
)
@click.option(
    "--input-dtype",
    type=click.Choice(["uint8", "float32", "int64"]),
    help="Of the raw input.  [default: the zoo model's own (uint8 for images), else float32]",
)
@click.option("--tokens", type=int, help="Number of different tokens, for int64 input; char-lstm has its classes.")
@click.option(
    "--mean",
    callback=_numbers(float, "numbers such as 0.5,0.5,0.5"),
    default="0",
    show_default=True,
    help="Subtracted from the scaled input, by channel: the first dimension, or else the last.",
)
@click.option(
    "--std",
    callback=_numbers(float, "numbers such as 0.5,0.5,0.5"),
    default="1",
    show_default=True,
    help="Then divided by.",
)
@click.option("--loss", type=click.Choice(["cross_entropy", "mse", "bce"]), default="cross_entropy", show_default=True)
@click.option("--optimizer", type=click.Choice(["sgd", "adamw"]), default="sgd", show_default=True)
@click.option("--momentum", type=float, help="Of SGD.  [default: 0]")
@click.option("--weight-decay", type=float, help="Of AdamW.  [default: 0.01]")
@click.option(
    "--jacobian-correction",
    type=float,
    default=0.0,
    show_default=True,
    metavar="LAMBDA",
    help="Draw steps on factors to where steps on their weights would lead; with --engine onnxruntime.",
)
@click.option(
    "--batch-size", type=int, default=32, show_default=True, help="Batch that the graphs are made fast for; any works."
)
@click.option(
    "--engine",
    type=click.Choice(["all", *ENGINES]),
    default="all",
    show_default=True,
    help="Engines to write the training step for; all that are installed, or one.",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of the initial weights.")
@force_option
@json_option
def command(
    model: str,
    output: Path,
    kind: Any,
    gamma: float,
    gamma_of: dict[str, float],
    rank_of: dict[str, int],
    form: Any,
    tanh: bool,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    personal: tuple[str, ...],
    batchnorm: Any,
    init: Any,
    initial_codec: str,
    pretrained: Path | None,
    classes: int | None,
    input_shape: tuple[int, ...] | None,
    input_dtype: Any,
    tokens: int | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    loss: Any,
    optimizer: Any,
    momentum: float | None,
    weight_decay: float | None,
    jacobian_correction: float,
    batch_size: int,
    engine: str,
    seed: int,
    force: bool,
    json: bool,
) -> None:
    """Factor MODEL and write a bundle that devices train.

    MODEL is mlp, cnn, vgg16, resnet18, char-lstm or har-transformer, or package.module:factory or file.py:factory, a
    function without arguments that returns your nn.Module.
    """
    from fedpara_edge.cli.installed import engines, require, require_engine

    require("export")
    if engine != "all":
        require_engine(engine)
    from export import make_bundle

    recipe = Recipe(
        name=model,
        kind=kind,
        gamma=gamma,
        gammas=gamma_of,
        ranks=rank_of,
        form=form,
        tanh=tanh,
        include=include or ("*",),
        exclude=exclude,
        personal=personal,
        batchnorm=batchnorm,
        init=init,
        initial_codec=initial_codec,
        pretrained=pretrained,
        classes=classes,
        input_shape=input_shape,
        input_dtype=input_dtype,
        tokens=tokens,
        mean=mean,
        std=std,
        loss=loss,
        optimizer=optimizer,
        momentum=momentum,
        weight_decay=weight_decay,
        jacobian_correction=jacobian_correction,
        batch_size=batch_size,
        engines=tuple(name for name in ENGINES if name in engines()) if engine == "all" else (engine,),
        seed=seed,
    )
    made = make_bundle(recipe, output, overwrite=force)
    layout = made.bundle.manifest.layout
    result = {
        "bundle": str(output),
        "fingerprint": made.bundle.manifest.fingerprint,
        "shared_parameters": layout.shared_parameters,
        "dense_parameters": layout.dense_parameters,
        "verification": {name: vars(errors) for name, errors in made.verification.items()},
        "layers": [
            {
                "name": layer.name,
                "kind": layer.spec.kind if layer.spec else None,
                "rank": layer.spec.rank if layer.spec else None,
                "reason": layer.reason,
                "relative_error": layer.relative_error,
            }
            for layer in made.report.layers
        ],
        "messages": list(made.report.messages),
    }
    verified = [
        f"{output}: {name} verified against torch: loss {errors.loss:.1e}, gradients {errors.gradient:.1e}, "
        f"outputs {errors.outputs:.1e}"
        + ("" if errors.step is None else f", {optimizer} step {errors.step:.1e}")
        + " (relative)"
        for name, errors in made.verification.items()
    ]
    text = "\n".join(
        [
            str(made.report),
            *verified,
            f"an update sends {megabytes(4 * layout.shared_parameters)}, "
            f"{layout.shared_parameters / layout.dense_parameters:.1%} of the dense model's "
            f"{megabytes(4 * layout.dense_parameters)}",
        ]
    )
    emit(result, text, as_json=json)
