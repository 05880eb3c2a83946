"""What a bundle is made of: the model, how it is factored, its input, loss and optimizer, as plain data.

`export.make_bundle` makes the bundle; this needs no torch, so that a plan of many bundles can be read and checked
without.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from fedpara_edge.codecs import find_encoder
from fedpara_edge.errors import InputError
from fedpara_edge.factors.layout import FORMS, KINDS, Form, Kind
from fedpara_edge.formats.bundle import ENGINES, Loss

InputDtype = Literal["uint8", "float32", "int64"]
Optimizer = Literal["sgd", "adamw"]
BatchNorm = Literal["refuse", "group"]
MAX_SIZE = 1 << 20
"""Of a dimension of the input, and of the number of classes."""
Init = Literal["composed", "he_fan_in", "he_fan_out"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a bundle is made of.

    Args:
        name: a model of the zoo, `package.module:factory` or `file.py:factory` (`fedpara_edge.nn.load_model`).
        kind: how to factor the layers.
        gamma: γ of the rank schedule (`fedpara_edge.factors.rank`).
        gammas: γ of some layers, by pattern of their names.
        ranks: rank of some layers, by pattern.
        form: of the factors of convolutions.
        tanh: the variant with tanh.
        include: patterns of the layers to factor.
        exclude: patterns of layers to leave dense, besides those that the zoo leaves so.
        personal: patterns of the layers or tensors that stay on the device.
        batchnorm: what to do with BatchNorm.
        init: how the factors are drawn (`fedpara_edge.nn.init`).
        initial_codec: codec in which the bundle stores the initial weights that are shared; devices start from what is
            decoded.
        pretrained: state_dict to fit the factors to.
        classes: of a zoo model; None for its own.
        input_shape: of one raw example; None for the zoo's.
        input_dtype: of the raw input; None for the zoo's, or float32.
        tokens: for int64 input, how many different tokens there are; None for the classes of a zoo model.
        mean: subtracted from the scaled input, by channel.
        std: then divided by.
        loss: what is minimized.
        optimizer: that devices use.
        momentum: of SGD; None for 0.
        weight_decay: of AdamW; None for 0.01.
        jacobian_correction: λ of the Jacobian correction (`export.step.jacobian`), for the engine onnxruntime alone.
        batch_size: that the graphs are made fast for; any works.
        engines: to write the training step for.
        seed: of the initial weights.

    Raises:
        InputError: a choice is none of those there are; the message starts with its field.
    """

    name: str
    kind: Kind = "fedpara"
    gamma: float = 0.1
    gammas: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    form: Form = "tensor"
    tanh: bool = False
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    personal: tuple[str, ...] = ()
    batchnorm: BatchNorm = "refuse"
    init: Init = "composed"
    initial_codec: str = "float32"
    pretrained: Path | None = None
    classes: int | None = None
    input_shape: tuple[int, ...] | None = None
    input_dtype: InputDtype | None = None
    tokens: int | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    loss: Loss = "cross_entropy"
    optimizer: Optimizer = "sgd"
    momentum: float | None = None
    weight_decay: float | None = None
    jacobian_correction: float = 0.0
    batch_size: int = 32
    engines: tuple[str, ...] = ENGINES
    seed: int = 0

    def __post_init__(self) -> None:
        choices: dict[str, tuple[Any, ...]] = {
            "kind": KINDS,
            "form": FORMS,
            "batchnorm": get_args(BatchNorm),
            "init": get_args(Init),
            "input_dtype": (None, *get_args(InputDtype)),
            "loss": get_args(Loss),
            "optimizer": get_args(Optimizer),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                listed = ", ".join(str(choice) for choice in known if choice is not None)
                raise InputError(f"{name}: expected one of {listed}, found {getattr(self, name)!r}")
        try:
            find_encoder(self.initial_codec)
        except InputError as error:
            raise InputError(f"initial_codec: {error}") from error
        if not 0 <= self.gamma <= 1:
            raise InputError(f"gamma: expected a number from 0 to 1, found {self.gamma!r}")
        if self.classes is not None and not 1 <= self.classes <= MAX_SIZE:
            raise InputError(f"classes: expected an integer from 1 to {MAX_SIZE}, found {self.classes}")
        if self.input_shape is not None and not all(1 <= size <= MAX_SIZE for size in self.input_shape):
            raise InputError(f"input_shape: expected sizes from 1 to {MAX_SIZE}, found {list(self.input_shape)}")
        if self.init != "composed" and self.pretrained is not None:
            raise InputError(f"init: expected composed with pretrained, which factors are fitted to, found {self.init}")
        if not (math.isfinite(self.jacobian_correction) and self.jacobian_correction >= 0):
            raise InputError(
                f"jacobian_correction: expected a number of at least 0, found {self.jacobian_correction!r}"
            )
        unknown = sorted(set(self.engines) - set(ENGINES))
        if unknown or not self.engines:
            found = repr(unknown[0]) if unknown else "none"
            raise InputError(f"engines: expected some of {', '.join(ENGINES)}, found {found}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed: expected an integer from 0 to {2**32 - 1}, found {self.seed}")
