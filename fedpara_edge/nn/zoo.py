"""Models to start from: plain PyTorch networks whose layers `convert` factors.

`mlp`, `cnn`, `vgg16`, `resnet18` and the MobileNets take float images [N, C, H, W] (any shape for `mlp`), `char-lstm`
takes text and `har-transformer` windows of sensor data. Only the MobileNets have BatchNorm, which is trained and
averaged unless another choice is made; scaling of uint8 images belongs to the export. Linear and convolution layers
that can be factored start with He's variance in every kind, recurrent ones with torch's.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import nn

from fedpara_edge.errors import InputError
from fedpara_edge.factors.factorization import BatchNorm, Factorization
from fedpara_edge.factors.layout import Form, Kind
from fedpara_edge.formats.inputs import InputDtype
from fedpara_edge.nn.blocks import STEPS_IN_A_PATCH, NextCharacter, ResidualBlock, SensorTransformer, SpatialMean
from fedpara_edge.nn.convert import convert
from fedpara_edge.nn.groupnorm import group_count
from fedpara_edge.nn.mobilenet import SMALL_IMAGE, MobileNetV2, MobileNetV3Small

VGG16_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
CNN_CHANNELS = (32, 64, 128, 256)
RESNET18_STAGES = (64, 128, 256, 512)


class Factory(Protocol):
    """Function that makes a model of the zoo."""

    def __call__(
        self,
        classes: int = 10,
        input_shape: tuple[int, ...] = ...,
        *,
        kind: Kind = "fedpara",
        gamma: float = 0.1,
        form: Form = "tensor",
        tanh: bool = False,
    ) -> nn.Module: ...


@dataclass(frozen=True, kw_only=True)
class ZooEntry:
    """One model of the zoo.

    Args:
        factory: Function that makes the model; with `kind="dense"`, the plain PyTorch model.
        input_shape: Default shape of one example.
        dense_layers: Patterns of the layers that the factory leaves dense, to `exclude` from a conversion.
        input_dtype: Default dtype of the raw input; `int64` for tokens, of which there are as many as classes.
        classes: Default number of classes.
        batchnorm: Default of what becomes of its BatchNorms.
    """

    factory: Factory
    input_shape: tuple[int, ...]
    dense_layers: tuple[str, ...] = ()
    batchnorm: BatchNorm = "refuse"
    input_dtype: InputDtype = "uint8"
    classes: int = 10


def mlp(
    classes: int = 10,
    input_shape: tuple[int, ...] = (1, 28, 28),
    hidden: int = 256,
    *,
    kind: Kind = "fedpara",
    gamma: float = 0.1,
    form: Form = "tensor",
    tanh: bool = False,
) -> nn.Module:
    """One hidden layer with ReLU, as in the paper's personalization experiments (section 3.4); both layers factored.

    >>> dense, small = mlp(62, kind="dense"), mlp(62, kind="pfedpara", gamma=0.5)
    >>> sum(p.numel() for p in dense.parameters())
    216894
    """
    layers: list[tuple[str, nn.Module]] = [
        ("flatten", nn.Flatten()),
        ("hidden", nn.Linear(math.prod(input_shape), hidden)),
        ("relu", nn.ReLU()),
        ("head", nn.Linear(hidden, classes)),
    ]
    return _finish(nn.Sequential(OrderedDict(layers)), "mlp", kind=kind, gamma=gamma, form=form, tanh=tanh)


def cnn(
    classes: int = 10,
    input_shape: tuple[int, ...] = (1, 28, 28),
    *,
    kind: Kind = "fedpara",
    gamma: float = 0.1,
    form: Form = "tensor",
    tanh: bool = False,
) -> nn.Module:
    """Four blocks of a 3x3 convolution (32 to 256 channels), GroupNorm, ReLU and 2x2 max pooling; a linear head.

    The first convolution and the head stay dense: for gray images the schedule gives the first rank 1, where all
    filters are multiples of one another, and both are small.

    >>> [sum(p.numel() for p in cnn(kind=kind).parameters()) for kind in ("dense", "fedpara")]
    [391370, 40628]
    """
    channels, height, width = _image_shape("cnn", input_shape, smallest=16)
    layers: list[tuple[str, nn.Module]] = []
    for index, width_out in enumerate(CNN_CHANNELS, start=1):
        layers += [*_conv_block(str(index), channels, width_out), (f"pool{index}", nn.MaxPool2d(2))]
        channels = width_out
    layers += [("flatten", nn.Flatten()), ("head", nn.Linear(channels * (height // 16) * (width // 16), classes))]
    return _finish(nn.Sequential(OrderedDict(layers)), "cnn", kind=kind, gamma=gamma, form=form, tanh=tanh)


def vgg16(
    classes: int = 10,
    input_shape: tuple[int, ...] = (3, 32, 32),
    *,
    stages: Sequence[Sequence[int]] = VGG16_STAGES,
    kind: Kind = "fedpara",
    gamma: float = 0.1,
    form: Form = "tensor",
    tanh: bool = False,
) -> nn.Module:
    """VGG16 with GroupNorm and three linear layers 512-512-classes that stay dense (section 3.1 and Table 5),
    as does the first convolution, which the paper gives rank 2 at γ = 0.1.

    Each of the five stages is some 3x3 convolutions, by their channels, and 2x2 max pooling.

    >>> sum(p.numel() for p in vgg16(classes=10, gamma=0.1).parameters())
    1548008
    """
    channels, height, width = _image_shape("vgg16", input_shape, smallest=32)
    layers: list[tuple[str, nn.Module]] = []
    for stage, widths in enumerate(stages, start=1):
        for index, width_out in enumerate(widths, start=1):
            layers += _conv_block(f"{stage}_{index}", channels, width_out)
            channels = width_out
        layers.append((f"pool{stage}", nn.MaxPool2d(2)))
    layers += [
        ("flatten", nn.Flatten()),
        ("linear1", nn.Linear(channels * (height // 32) * (width // 32), 512)),
        ("relu1", nn.ReLU()),
        ("linear2", nn.Linear(512, 512)),
        ("relu2", nn.ReLU()),
        ("head", nn.Linear(512, classes)),
    ]
    return _finish(nn.Sequential(OrderedDict(layers)), "vgg16", kind=kind, gamma=gamma, form=form, tanh=tanh)


def resnet18(
    classes: int = 10,
    input_shape: tuple[int, ...] = (3, 32, 32),
    *,
    stages: Sequence[int] = RESNET18_STAGES,
    kind: Kind = "fedpara",
    gamma: float = 0.1,
    form: Form = "tensor",
    tanh: bool = False,
) -> nn.Module:
    """ResNet18 with GroupNorm and a 3x3 stem without pooling, for small images; the head stays dense.

    Each stage is two residual blocks, by their channels; from the second on they halve height and width.
    """
    channels, _, _ = _image_shape("resnet18", input_shape, smallest=8)
    width = stages[0]
    layers: list[tuple[str, nn.Module]] = _conv_block("0", channels, width, bias=False)
    for stage, width_out in enumerate(stages, start=1):
        layers.append((f"block{stage}_1", ResidualBlock(width, width_out, stride=1 if stage == 1 else 2)))
        layers.append((f"block{stage}_2", ResidualBlock(width_out, width_out)))
        width = width_out
    layers += [("mean", SpatialMean()), ("head", nn.Linear(width, classes))]
    return _finish(nn.Sequential(OrderedDict(layers)), "resnet18", kind=kind, gamma=gamma, form=form, tanh=tanh)


def char_lstm(
    classes: int = 80,
    input_shape: tuple[int, ...] = (80,),
    *,
    kind: Kind = "fedpara",
    gamma: float = 0.1,
    form: Form = "tensor",
    tanh: bool = False,
) -> nn.Module:
    """Next-character model for text: an embedding of width 8, two LSTM layers of 256, a linear head.

    Takes characters int64 [N, T] in [0, classes) and returns, for every position, the logits of the next character,
    [N, classes, T], for labels [N, T]. This is the model of the paper's experiments on Shakespeare (section 3.1), there
    with one label per window, as in LEAF (arXiv 1812.01097), whose embedding this is. Input and recurrent weights are
    factored; embedding and head are dense. The paper's 19 % of the parameters correspond to γ = 0:

    >>> dense, small = (sum(p.numel() for p in char_lstm(**options).parameters()) for options in (
    ...     {"kind": "dense"}, {"gamma": 0.0}))
    >>> dense, small, f"{small / dense:.1%}"
    (819920, 154368, '18.8%')
    """
    if len(input_shape) != 1 or min(input_shape) < 1:
        raise InputError(f"char-lstm: expected an input shape (characters,) of at least 1, found {input_shape}")
    return _finish(NextCharacter(classes), "char-lstm", kind=kind, gamma=gamma, form=form, tanh=tanh)


def har_transformer(
    classes: int = 5,
    input_shape: tuple[int, ...] = (100, 6),
    *,
    kind: Kind = "fedpara",
    gamma: float = 0.1,
    form: Form = "tensor",
    tanh: bool = False,
) -> nn.Module:
    """Transformer encoder of two pre-norm blocks of width 128, which recognizes the activity in windows of sensor data.

    Takes float windows [N, T, C], T a multiple of 5. A linear layer makes a token of five steps, to which a learned
    position is added; the mean over all tokens goes to a linear head. The projections of attention and those of the
    feed-forward layers are factored; queries, keys and values are one projection, whose factors are smaller than
    those of three.

    >>> [sum(p.numel() for p in har_transformer(**options).parameters()) for options in (
    ...     {"kind": "dense"}, {"gamma": 0.0}, {})]
    [271621, 83205, 102661]
    """
    if len(input_shape) != 2 or min(input_shape) < 1 or input_shape[0] % STEPS_IN_A_PATCH:
        expected = f"(steps, channels) with a multiple of {STEPS_IN_A_PATCH} steps"
        raise InputError(f"har-transformer: expected an input shape {expected}, found {input_shape}")
    model = SensorTransformer(classes, *input_shape)
    return _finish(model, "har-transformer", kind=kind, gamma=gamma, form=form, tanh=tanh)


def mobilenet_v2(
    classes: int = 10,
    input_shape: tuple[int, ...] = (3, 96, 96),
    *,
    width: float = 1.0,
    kind: Kind = "fedpara",
    gamma: float = 0.1,
    form: Form = "tensor",
    tanh: bool = False,
) -> nn.Module:
    """MobileNetV2 (`fedpara_edge.nn.mobilenet`) for images of 96x96, 32x32 and others; depthwise layers stay dense.

    Args:
        classes: Number of classes.
        input_shape: Shape of an image (channels, height, width).
        width: Multiplier of the channels.
        kind: Parameterization of the pointwise convolutions; `dense` for the plain model.
        gamma: γ of the rank schedule.
        form: Factors of convolutions.
        tanh: Whether each Hadamard operand passes through tanh.

    >>> sum(p.numel() for p in mobilenet_v2(1000, kind="dense").parameters())
    3504872
    """
    channels, *size = _image_shape("mobilenetv2", input_shape, smallest=32)
    model = MobileNetV2(classes, channels, width=width, small=min(size) < SMALL_IMAGE)
    return _finish(model, "mobilenetv2", kind=kind, gamma=gamma, form=form, tanh=tanh)


def mobilenet_v3_small(
    classes: int = 10,
    input_shape: tuple[int, ...] = (3, 96, 96),
    *,
    width: float = 1.0,
    kind: Kind = "fedpara",
    gamma: float = 0.1,
    form: Form = "tensor",
    tanh: bool = False,
) -> nn.Module:
    """MobileNetV3-small (`fedpara_edge.nn.mobilenet`), otherwise as `mobilenet_v2`.

    >>> sum(p.numel() for p in mobilenet_v3_small(1000, kind="dense").parameters())
    2542856
    """
    channels, *size = _image_shape("mobilenetv3-small", input_shape, smallest=32)
    model = MobileNetV3Small(classes, channels, width=width, small=min(size) < SMALL_IMAGE)
    return _finish(model, "mobilenetv3-small", kind=kind, gamma=gamma, form=form, tanh=tanh)


ZOO: dict[str, ZooEntry] = {
    "mlp": ZooEntry(factory=mlp, input_shape=(1, 28, 28)),
    "cnn": ZooEntry(factory=cnn, input_shape=(1, 28, 28), dense_layers=("conv1", "head")),
    "vgg16": ZooEntry(factory=vgg16, input_shape=(3, 32, 32), dense_layers=("linear1", "linear2", "head")),
    "resnet18": ZooEntry(factory=resnet18, input_shape=(3, 32, 32), dense_layers=("head",)),
    "char-lstm": ZooEntry(
        factory=char_lstm, input_shape=(80,), dense_layers=("embedding", "head"), input_dtype="int64", classes=80
    ),
    "har-transformer": ZooEntry(
        factory=har_transformer,
        input_shape=(100, 6),
        dense_layers=("patch", "head"),
        input_dtype="float32",
        classes=5,
    ),
    "mobilenetv2": ZooEntry(
        factory=mobilenet_v2,
        input_shape=(3, 96, 96),
        dense_layers=("features.0.0", "classifier.1"),
        batchnorm="train",
    ),
    "mobilenetv2-0.25": ZooEntry(
        factory=partial(mobilenet_v2, width=0.25),
        input_shape=(3, 96, 96),
        dense_layers=("features.0.0", "classifier.1"),
        batchnorm="train",
    ),
    "mobilenetv3-small": ZooEntry(
        factory=mobilenet_v3_small,
        input_shape=(3, 96, 96),
        dense_layers=("features.0.0", "classifier.3"),
        batchnorm="train",
    ),
}
"""Models by name."""


def _conv_block(name: str, inputs: int, outputs: int, *, bias: bool = True) -> list[tuple[str, nn.Module]]:
    return [
        (f"conv{name}", nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)),
        (f"norm{name}", nn.GroupNorm(group_count(outputs), outputs)),
        (f"relu{name}", nn.ReLU()),
    ]


def _image_shape(name: str, shape: tuple[int, ...], *, smallest: int) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape) < 1 or min(shape[1:]) < smallest:
        expected = f"(channels, height, width) of at least {smallest}x{smallest}"
        raise InputError(f"{name}: expected an input shape {expected}, found {shape}")
    return shape[0], shape[1], shape[2]


def _finish(model: nn.Module, name: str, *, kind: Kind, gamma: float, form: Form, tanh: bool) -> nn.Module:
    dense_layers = ZOO[name].dense_layers
    for layer_name, layer in model.named_modules():
        # Linear layers that stay dense keep torch's smaller initialization: with He's, vgg16 diverges at lr 0.1.
        if isinstance(layer, nn.Conv2d) or (isinstance(layer, nn.Linear) and layer_name not in dense_layers):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    if kind == "dense":
        return model
    batchnorm = ZOO[name].batchnorm
    factorization = Factorization(
        kind=kind, gamma=gamma, form=form, tanh=tanh, exclude=dense_layers, batchnorm=batchnorm
    )
    return convert(model, factorization)[0]
