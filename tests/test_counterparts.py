"""Every layer with a factored counterpart computes, starts, fits, exports and folds as torch's with its weights."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from device_runtime.engines.registry import ENGINES
from export import export_bundle
from export.folding.fold import fold
from fedpara_edge.factors.factorization import Factorization
from fedpara_edge.factors.layout import Kind
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.formats.weights import read_weights
from fedpara_edge.nn import Embedding, FactoredLayer, MultiheadAttention, convert, layout_of
from fedpara_edge.nn.counterparts import weight_of
from fedpara_edge.nn.embedding import COMPOSED_ROWS
from fedpara_edge.nn.selection import find_weights

torch.set_num_threads(1)  # the tensors are too small for threads to pay
KINDS: tuple[Kind, ...] = ("fedpara", "pfedpara", "lowrank")


class Conv1D(nn.Module):
    """The linear layer of transformers, with weight [I, O]."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(0.02 * torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).reshape(*x.shape[:-1], self.nf)


Conv1D.__module__ = "transformers.pytorch_utils"

Make = Callable[[], nn.Module]
LAYERS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(24, 32, 5, stride=2, padding=2, dilation=2), (24, 20)),
    "conv1d of groups": (lambda: nn.Conv1d(24, 48, 5, groups=2, padding="same", bias=False), (24, 20)),
    "conv2d of groups": (lambda: nn.Conv2d(32, 64, 3, groups=4, padding=1), (32, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(64, 64, 3, groups=64, padding=1), (64, 6, 6)),
    "pointwise": (lambda: nn.Conv2d(32, 64, 1), (32, 6, 6)),
    "circular": (lambda: nn.Conv2d(32, 64, 3, padding=1, padding_mode="circular"), (32, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(24, 32, (3, 2, 3)), (24, 5, 5, 5)),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(32, 24, 4, stride=2), (32, 9)),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(32, 24, 4, stride=2, padding=1), (32, 5, 5)),
    "transposed conv3d": (lambda: nn.ConvTranspose3d(32, 24, 3), (32, 3, 3, 3)),
    "linear of transformers": (lambda: Conv1D(96, 32), (7, 32)),
}


def factored(model: nn.Module, **options: object) -> nn.Module:
    # By name, as a depthwise convolution stays dense unless it is asked for.
    converted, report = convert(model, Factorization(gamma_of={"?*": 0}, **options))  # type: ignore[arg-type]
    assert report.converted
    return converted


def put_back(model: nn.Module, converted: nn.Module) -> nn.Module:
    """The model with the weights that the converted one composes, and its biases."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in find_weights(model).items():
            layer = converted.get_submodule(name)
            if weight.value is not None and isinstance(layer, FactoredLayer):
                weight.value.copy_(layer.compose())
            if isinstance(bias := getattr(weight.layer, "bias", None), nn.Parameter):
                bias.copy_(layer.bias)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_factored_layer_is_torchs_with_the_composed_weight(name: str, kind: Kind) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    model = nn.Sequential(make())
    converted = factored(model, kind=kind)
    x = torch.randn(3, *shape)
    torch.testing.assert_close(converted(x), put_back(model, converted)(x))
    assert {spec.name: spec.kind for spec in layout_of(converted).layers} == {"0": kind}
    assert converted[0].weight.shape == model[0].weight.shape
    assert not any("_layer" in key for key in converted.state_dict())


@pytest.mark.parametrize("name", LAYERS)
def test_a_copy_has_factors_of_its_own(name: str) -> None:
    make, shape = LAYERS[name]
    once = factored(nn.Sequential(make())).double()
    twice, x = copy.deepcopy(once), torch.randn(3, *shape, dtype=torch.float64)
    with torch.no_grad():
        twice[0].x1.mul_(2)
    assert twice(x).dtype == torch.float64
    assert not torch.equal(once(x), twice(x))


def test_others_start_with_the_size_of_the_layers_own_weights() -> None:
    torch.manual_seed(0)
    for make in (
        lambda: nn.ConvTranspose2d(32, 24, 4),
        lambda: Conv1D(96, 32),
        lambda: nn.Embedding(200, 32),
    ):
        model = nn.Sequential(make())
        size = model[0].weight.square().mean().sqrt()
        assert factored(model)[0].weight.detach().square().mean().sqrt() == pytest.approx(size.item(), rel=1e-4)


@pytest.mark.parametrize("rows", [300, COMPOSED_ROWS + 300])
@pytest.mark.parametrize("padding", [None, 0])
def test_an_embedding_looks_rows_up(rows: int, padding: int | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(rows, 32, padding_idx=padding))
    converted = factored(model)
    assert isinstance(converted[0], Embedding)
    x = torch.randint(rows, (4, 7))
    x[0, :3] = 0
    table = converted[0].compose()
    expected = F.embedding(x, table)
    if padding is not None:
        expected = torch.where((x == padding).unsqueeze(-1), 0.0, expected)
    torch.testing.assert_close(converted(x), expected)
    converted(x).square().sum().backward()
    gradient = converted[0].x1.grad.abs().sum(1)
    assert bool(gradient[0] > 0) == (padding is None)
    assert gradient[x[0, 3]] > 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_norm": 1.0}, "max_norm=1.0"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq=True"),
        ({"sparse": True}, "sparse=True"),
    ],
)
def test_embeddings_with_an_option_that_factors_lack_stay(options: dict[str, object], reason: str) -> None:
    _, report = convert(nn.Sequential(nn.Embedding(300, 32, **options)))  # type: ignore[arg-type]
    assert report.layers[0].reason == reason


def test_an_embedding_whose_padding_is_not_zero_stays() -> None:
    model = nn.Sequential(nn.Embedding(300, 32, padding_idx=3))
    nn.init.normal_(model[0].weight)
    assert convert(model)[1].layers[0].reason == "row 3, of padding_idx, is not zero"


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 40, "vdim": 48}, {"bias": False}, {"add_bias_kv": True}])
def test_attention_is_torchs_with_the_composed_weights(batch_first: bool, sizes: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4, batch_first=batch_first, **sizes)})
    converted = factored(model)
    assert isinstance(converted["attention"], MultiheadAttention)
    own = put_back(model, converted)
    query = torch.randn(5, 5, 32)
    key, value = torch.randn(5, 5, sizes.get("kdim", 32)), torch.randn(5, 5, sizes.get("vdim", 32))
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    for training in (True, False):
        own.train(training), converted.train(training)
        expected = own["attention"](query, key, value, attn_mask=mask)
        for found, wanted in zip(converted["attention"](query, key, value, attn_mask=mask), expected, strict=True):
            torch.testing.assert_close(found, wanted)
    names = {spec.name for spec in layout_of(converted).layers if spec.kind != "dense"}
    assert names == {f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")}


def test_a_projection_that_is_excluded_keeps_its_values() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4)})
    converted, _ = convert(model, Factorization(gamma=0, exclude=("attention.k_proj",)))
    kept = converted["attention"].k_proj
    assert kept.spec.kind == "dense"
    assert torch.equal(kept(), model["attention"].in_proj_weight[32:64])


def test_an_encoder_takes_masks_and_fast_paths() -> None:
    """torch's encoder has paths for inference that read dense weights."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    converted = factored(nn.TransformerEncoder(layer, 2))
    x, mask = torch.randn(2, 6, 32), torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 4:] = True
    trained = converted(x, src_key_padding_mask=mask)
    with torch.no_grad():
        evaluated = converted.eval()(x, src_key_padding_mask=mask)
    torch.testing.assert_close(evaluated[~mask], trained[~mask])


@pytest.mark.parametrize("name", [*LAYERS, "embedding", "attention"])
def test_pretrained_weights_are_fitted(name: str) -> None:
    """A weight of the wanted structure is recovered."""
    torch.manual_seed(0)
    make = {"embedding": lambda: nn.Embedding(300, 24), "attention": lambda: nn.MultiheadAttention(32, 4)}.get(name)
    model = nn.Sequential(make() if make else LAYERS[name][0]())
    for weight in find_weights(model).values():
        assert weight.value is not None
        rows, columns = weight.value.shape[0], weight.value[0].numel()
        low = torch.randn(rows, 1) @ torch.randn(1, columns)
        with torch.no_grad():
            weight.value.copy_(low.reshape(weight.value.shape))
    converted, report = convert(model, Factorization(kind="lowrank", form="matrix"), pretrained=True)
    for line in report.converted:
        assert line.relative_error is not None
        assert line.relative_error < 1e-3
        (spec,) = (spec for spec in layout_of(converted).layers if spec.name == line.name)
        weight = find_weights(model)[line.name]
        assert weight.value is not None
        torch.testing.assert_close(converted.get_submodule(spec.name).compose(), weight.value, rtol=1e-3, atol=1e-3)


def test_weights_are_views() -> None:
    for make in (*(make for make, _ in LAYERS.values()), lambda: nn.MultiheadAttention(32, 4)):
        for weight in find_weights(nn.Sequential(make())).values():
            (parameter,) = weight.parameters
            assert weight.value is not None
            assert weight.value.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    assert weight_of(nn.Linear(3, 4), "weight") is not None


class TextNet(nn.Module):
    """Embedding, convolutions over time, attention and transformers' linear layer."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, 24, padding_idx=0)
        self.conv = nn.Conv1d(24, 32, 3, padding=1)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.mlp = Conv1D(48, 32)
        self.head = nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(self.embedding(x).mT)).mT
        h = h + self.attention(h, h, h, need_weights=False)[0]
        logits: Tensor = self.head(torch.tanh(self.mlp(h)).mean(1))
        return logits


MODELS: dict[str, tuple[Make, ExportConfig, int]] = {
    "text": (
        lambda: TextNet(100),
        ExportConfig(input_shape=(12,), input_dtype="int64", tokens=100, engines=tuple(ENGINES)),
        7,
    ),
    "long table": (
        lambda: TextNet(COMPOSED_ROWS + 100),
        ExportConfig(input_shape=(12,), input_dtype="int64", tokens=COMPOSED_ROWS + 100, engines=("onnxruntime",)),
        6,
    ),
    "images": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 24, 4, stride=4),
            nn.Conv2d(24, 48, 3, groups=2, padding=1),
            nn.Tanh(),
            nn.ConvTranspose2d(48, 16, 3),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 3),
        ),
        ExportConfig(input_shape=(3, 12, 12), engines=("onnxruntime",)),
        3,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_they_export_and_fold(name: str, tmp_path: Path) -> None:
    """Verified against torch, with every weight composed but that of a table which is looked up."""
    make, config, layers = MODELS[name]
    torch.manual_seed(0)
    converted, report = convert(make(), Factorization(gamma=0))
    bundle, verification = export_bundle(converted, tmp_path / "bundle", config)
    assert set(verification) == set(config.engines)
    assert bundle.manifest.layout.dense_parameters == report.parameters
    folding = fold(bundle, read_weights(tmp_path / "bundle" / "weights.safetensors"), tmp_path / "model.onnx")
    assert len(folding.layers) == layers
    assert np.isfinite(folding.error)
