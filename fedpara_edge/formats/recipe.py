"""What a bundle is made from: how to factor a model, how to export it, and a recipe of both, as plain data.

`export` makes the bundle; this needs no torch, so that a plan of many bundles can be read and checked without.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedpara_edge.codecs import find_encoder
from fedpara_edge.codecs.codec import Encoder
from fedpara_edge.errors import InputError
from fedpara_edge.factors.factorization import COMPOSED, Factorization
from fedpara_edge.formats.bundle import ENGINES
from fedpara_edge.formats.drawn import Drawn
from fedpara_edge.formats.inputs import MAX_SIZE, InputDtype, find_input
from fedpara_edge.losses import LOSSES, find_head
from fedpara_edge.options import check, declared, option

Optimizer = Literal["sgd", "adamw"]
SINGLE = ("input_shape", "input_dtype", "tokens", "mean", "std")
"""Options for a model of one input, which several inputs have each for themselves."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """How a model is exported (`fedpara_edge.export`).

    Args:
        name: Name of the model, of which the manifest has the `title`.
        personal: Patterns of the layers or tensors that stay on the device (`fedpara_edge.factors.roles`).
        initial_codec: Codec in which the bundle stores the shared initial weights; devices start from what it decodes
            to; or `drawn`, for other random weights of the same size, from the seed.
        input: Inputs of a model with several, each as `find_input` takes it: the name of an argument of `forward`, and
            its options.
        input_shape: Shape of one raw example, such as (1, 28, 28); needed for a model of one input that is not of the
            zoo.
        input_dtype: Dtype of the raw input: `uint8` (scaled to [0, 1] in the graph), `float32`, or `int64` tokens; None
            for the zoo model's own, or else float32.
        tokens: Number of different tokens, for int64 input; None for the classes of a zoo model.
        mean: Mean that is subtracted from the scaled input, one number or one per channel.
        std: Standard deviation by which it is then divided, likewise.
        output_name: Outputs of the model, for one that returns several: the one to train, and others to predict.
        loss: Losses to minimize, each as `fedpara_edge.losses.find_head` takes it: `cross_entropy` over outputs [B, C]
            and labels int64 [B], or [B, C, T] and [B, T] for a label at each of T positions; others, such as `mse`, or
            `bce` with logits, over float32 labels of the outputs' shape. Several are one for each trained output.
        class_names: Names of the classes of the first label in the order of their numbers; none for numbers alone.
        optimizer: Optimizer of the devices.
        momentum: Momentum of SGD; None for 0.
        weight_decay: Weight decay of AdamW; None for 0.01.
        jacobian_correction: Strength λ of the Jacobian correction (`export.step.jacobian`); engine onnxruntime only.
        frobenius_decay: Strength λ of the Frobenius decay (`export.step.frobenius`); engine onnxruntime only.
        batch_size: Batch size for which the graphs are optimized; any other works as well.
        engines: Engines to write the training step for; None for those of the installed ones that can.
        tunable: Whether to write a second form of the engine onnxruntime's training step, for devices to choose from.
        seed: Seed of the initial weights and of the batches used for verification.

    Raises:
        InputError: A value is out of its range, or two values don't go together.
    """

    name: str = option("model", help="Name of the model.")
    personal: tuple[str, ...] = option((), metavar="PATTERN", help="Layers or tensors that stay on the device.")
    initial_codec: str = option(
        "float32",
        metavar="CODEC",
        help="Codec of the initial weights in weights.safetensors; int4 does no harm to random ones, and drawn draws "
        "others of the same size from the seed, which is all that is stored. "
        "onnxruntime-training's files have them in float32 in any case.",
    )
    input: tuple[str, ...] = option(
        (),
        metavar="NAME:OPTION=VALUE,...",
        help="Input of a model with several, by the name of an argument of its forward: shape, dtype (float32, uint8, "
        "int64 or bool), tokens, mean and std, as in x:shape=3,32,32,mean=0.5 or day:dtype=int64,tokens=7.",
    )
    input_shape: tuple[int, ...] | None = option(
        None,
        minimum=1,
        maximum=MAX_SIZE,
        metavar="SIZES",
        unset="the zoo model's own",
        help="Shape of one example, such as 1,28,28; needed for your own model.",
    )
    input_dtype: InputDtype | None = option(
        None, unset="the zoo model's own (uint8 for images), else float32", help="Dtype of the raw input."
    )
    tokens: int | None = option(
        None, minimum=1, unset="the classes of a zoo model", help="Number of different tokens, for int64 input."
    )
    mean: tuple[float, ...] = option(
        (0.0,),
        metavar="NUMBERS",
        help="Mean subtracted from the scaled input, by channel: along the first dimension, or else the last.",
    )
    std: tuple[float, ...] = option((1.0,), metavar="NUMBERS", help="Standard deviation that it is then divided by.")
    output_name: tuple[str, ...] = option(
        (),
        metavar="NAME",
        help="Output to train, of a model that returns a dict, a dataclass or a tuple (output_0, output_1, ...); "
        "further ones are given by predict.",
    )
    loss: tuple[str, ...] = option(
        ("cross_entropy",),
        metavar="[OUTPUT=]LOSS[:OPTION=VALUE,...]",
        help=f"Loss to minimize: {', '.join(LOSSES)}, with options such as cross_entropy:label_smoothing=0.1, or a "
        "function of outputs and labels in torch, losses.py:focal. To train "
        "several outputs, one for each with its name, such as age=l1:weight=0.5.  [default: cross_entropy]",
    )
    class_names: tuple[str, ...] = option(
        (),
        metavar="NAMES",
        unset="their numbers",
        help="Names of the classes in the order of their numbers, with commas between them; labels may be these.",
    )
    optimizer: Optimizer = option("sgd", help="Optimizer of the devices.")
    momentum: float | None = option(
        None, minimum=0, below=1, only=("optimizer", ("sgd",)), unset="0", help="Momentum of SGD."
    )
    weight_decay: float | None = option(
        None, minimum=0, only=("optimizer", ("adamw",)), unset="0.01", help="Weight decay of AdamW."
    )
    betas: tuple[float, float] | None = option(
        None,
        minimum=0,
        below=1,
        only=("optimizer", ("adamw",)),
        unset="0.9,0.999",
        metavar="NUMBERS",
        help="Decays of AdamW's moments.",
    )
    eps: float | None = option(
        None, minimum=0, only=("optimizer", ("adamw",)), unset="1e-8", help="Number added to AdamW's denominators."
    )
    jacobian_correction: float = option(
        0.0,
        minimum=0,
        metavar="LAMBDA",
        help="Draw steps on factors to where steps on their weights would lead; with --engines onnxruntime.",
    )
    frobenius_decay: float = option(
        0.0,
        minimum=0,
        metavar="LAMBDA",
        help="Decay of the composed weights in place of that of their factors, by their gradient; with --engines "
        "onnxruntime, and with AdamW best with --weight-decay 0.",
    )
    batch_size: int = option(32, minimum=1, help="Batch size for which the graphs are optimized; any other works.")
    engines: tuple[str, ...] | None = option(
        None,
        choices=ENGINES,
        was=("engine",),
        metavar="ENGINE",
        unset="those that can train the model here",
        help="Engines to write the training step for.",
    )
    tunable: bool = option(
        False,
        help="Write a second form of the engine onnxruntime's training step, with convolutions as the model has them, "
        "for `train --tune` to choose from.",
    )
    seed: int = option(0, minimum=0, maximum=2**32 - 1, help="Seed of the initial weights.")

    @property
    def initial_encoder(self) -> Encoder:
        """Encoder of the shared initial weights."""
        return Drawn(seed=self.seed) if self.initial_codec == Drawn.name else find_encoder(self.initial_codec)

    @property
    def title(self) -> str:
        """Name of the model for files that leave this machine: without the folder of its own file, if it has one."""
        where, colon, factory = self.name.rpartition(":")
        return f"{Path(where).name}{colon}{factory}"

    @property
    def of_weights(self) -> list[str]:
        """Names of the options in use that change the gradients of composed weights."""
        return [name for name in ("jacobian_correction", "frobenius_decay") if getattr(self, name)]

    def __post_init__(self) -> None:
        check(self)
        classes = tuple(name.strip() for text in self.class_names for name in text.split(","))
        object.__setattr__(self, "class_names", classes)
        if not all(classes) or len({*classes}) < len(classes):
            raise InputError(f"expected different names, none empty, found {', '.join(classes)}", key="class_names")
        try:
            _ = self.initial_encoder
        except InputError as error:
            raise error.about("initial_codec") from error
        heads = [find_head(text)[0] for text in self.loss]
        if not heads or (len(heads) > 1 and (None in heads or len({*heads}) < len(heads))):
            raise InputError(
                f"expected one, or several with the name of a different output each, as in age=l1, found "
                f"{', '.join(self.loss) or 'none'}",
                key="loss",
            )
        names = [find_input(text)[0] for text in self.input]
        if len({*names}) < len(names):
            raise InputError(f"expected different names, found {', '.join(names)}", key="input")
        given = [name for name in SINGLE if getattr(self, name) != declared(ExportConfig)[name].default]
        if self.input and given:
            raise InputError(
                f"expected with one input alone, found beside {names[0]!r}; write it after its name, in input",
                key=given[0],
            )
        if self.engines is not None and not self.engines:
            raise InputError(f"expected some of {', '.join(ENGINES)}, found none", key="engines")
        if self.tunable and "onnxruntime" not in (self.engines or ENGINES):
            raise InputError(
                "expected with engine onnxruntime, whose training step has two forms, found without; leave it out",
                key="tunable",
            )
        if self.of_weights and "ort-training" in (self.engines or ()):
            raise InputError(
                f"expected onnxruntime alone with {self.of_weights[0]}, found ort-training, whose gradients are "
                "those of the loss alone; export for the engine onnxruntime",
                key="engines",
            )
        if len(self.of_weights) > 1:
            raise InputError("expected one of both, found it with jacobian_correction", key=self.of_weights[1])


@dataclass(frozen=True, kw_only=True)
class Recipe(ExportConfig, Factorization):
    """A model by name, how it is factored and how it is exported.

    Args:
        name: Model of the zoo, `package.module:factory` or `file.py:factory` (`fedpara_edge.nn.load_model`).
        classes: Number of classes of a zoo model; None for that of the names of classes, or else its own.
        pretrained: State dict or checkpoint, `.safetensors` or of `torch.save`, that the factors are fitted to.
        new_head: Patterns of the tensors, or of the modules that hold them, that are left as initialized.
        example: Data to verify with, in place of random inputs, and to take shapes and dtypes of inputs and names of
            classes from.

    Raises:
        InputError: A value is out of its range, or two values don't go together.
    """

    name: str = option(help="Model of the zoo, package.module:factory or file.py:factory.")
    classes: int | None = option(
        None, minimum=1, maximum=MAX_SIZE, unset="its own", help="Number of classes of a zoo model."
    )
    pretrained: Path | None = option(
        None, metavar="FILE", help="State dict or checkpoint (.safetensors or .pt) that the factors are fitted to."
    )
    new_head: tuple[str, ...] = option(
        (), metavar="PATTERN", help="Layers or tensors that are new, and not taken from the pretrained weights."
    )

    example: Path | None = option(
        None,
        metavar="DATA",
        help="Data to verify with, from which the inputs' shapes and dtypes and the classes' names are taken too.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init not in COMPOSED and self.pretrained is not None:
            raise InputError(
                f"expected composed or own with pretrained, which factors are fitted to, found {self.init}", key="init"
            )
        if self.initial_codec == Drawn.name and self.pretrained is not None:
            raise InputError(
                "expected a codec that keeps the weights of pretrained, found drawn; leave it out", key="initial_codec"
            )
        if self.new_head and self.pretrained is None:
            raise InputError("expected with pretrained, found without; leave it out", key="new_head")
