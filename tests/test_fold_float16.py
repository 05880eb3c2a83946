"""Laws of folding to float16: what it can't hold keeps its meaning, in arithmetic that rounds after every operator."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from folded import initial_weights, quick_export
from norms import relative_error
from numpy.typing import NDArray
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.nn import functional as F

from export.folding.fold import fold
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.folded import Precision
from fedpara_edge.nn import Linear

WIDTH = 16
Inputs = NDArray[Any]


class Cosine(nn.Module):
    """Cosines to class vectors: norms at least 1e-12, of features that may all be 0."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.classes = Linear(WIDTH, 8, rank=2), nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return 10 * F.linear(F.normalize(torch.relu(self.features(x))), F.normalize(self.classes))


class Masked(nn.Module):
    """Attention over tokens, of which token 0 is padding; `how` says how its scores are masked."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.embed, self.key, self.head = nn.Embedding(12, WIDTH), Linear(WIDTH, WIDTH, rank=3), nn.Linear(WIDTH, 3)
        self.register_buffer("causal", torch.full((6, 6), -1e9).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        scores = self.key(h) @ h.transpose(1, 2)
        padding = (x == 0)[:, None, :]
        match self.how:
            case "where":
                scores = scores.masked_fill(padding, -1e9)
            case "least":
                scores = scores + padding.float() * torch.finfo(torch.float32).min
            case "causal and padding":
                scores = scores + self.causal + padding.float() * -1e9
        return self.head((scores.softmax(-1) @ h).mean(1))


class Formula(nn.Module):
    """A factored layer, a formula of its outputs, and a head."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.body, self.formula, self.head = Linear(WIDTH, WIDTH, rank=3), FORMULAS[name], nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.formula(self.body(x)))


def standardized(h: Tensor) -> Tensor:
    centered = h - h.mean(1, keepdim=True)
    return centered / (centered.square().mean(1, keepdim=True) + 1e-12).sqrt()


FORMULAS = {
    "softmax of large logits": lambda h: (3e5 * h).softmax(1),
    "sum of squares": lambda h: h / (h * h).sum(1, keepdim=True),
    "a large scale and back": lambda h: (h * 1e5 + 1e5) / 1e5,
    "variance": lambda h: standardized(300 * h),
    "variance of small values": lambda h: standardized(1e-4 * h),
    "exponentials": lambda h: h.exp() / (1 + h.exp()),
    "logarithm": lambda h: (h.softmax(1) + 1e-9).log(),
    "cube": lambda h: torch.tanh(h**3),
    "inverse root": lambda h: h * (h.square().mean(1, keepdim=True) + 1e-8) ** -0.5,
    "far bounds": lambda h: h.clamp(-1e6, 1e6),
    "layer norm": lambda h: F.layer_norm(1e-5 * h, (WIDTH,), eps=1e-12),
    "group norm": lambda h: F.group_norm(1e-5 * h, 4, eps=1e-12),
    "resize": lambda h: F.interpolate(h[:, None], scale_factor=2.0, mode="linear")[:, 0, ::2],
}


def check(model: nn.Module, bundle: Bundle, precision: Precision, x: Inputs, tolerance: float) -> onnx.ModelProto:
    """Fold, run with every operator rounded to its own precision, and compare with torch."""
    path = bundle.path.parent / "model.onnx"
    fold(bundle, initial_weights(bundle), path, precision=precision)
    folded = onnx.load(path)
    found = ReferenceEvaluator(folded).run(None, {"x": x})[0]
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert relative_error(found, model.eval()(torch.from_numpy(x)).detach().numpy()) <= tolerance
    return folded


def stored(model: onnx.ModelProto) -> dict[str, int]:
    return {tensor.name: tensor.data_type for tensor in model.graph.initializer}


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_features_that_are_all_zero_have_a_cosine(precision: Precision, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Cosine()
    with torch.no_grad():
        model.features.bias.fill_(-0.5)
    x = np.random.default_rng(0).standard_normal((8, WIDTH), np.float32)
    x[0] = 0
    assert not model(torch.from_numpy(x[:1])).any()
    folded = check(
        model,
        quick_export(model, tmp_path / "bundle", (WIDTH,), "onnxruntime"),
        precision,
        x,
        0.01 if precision == "float16" else 0.1,
    )
    if precision == "float16":
        types = stored(folded)
        assert {types[name] for name in ("features.weight", "features.bias")} == {TensorProto.FLOAT16}


@pytest.mark.parametrize("precision", ["float16", "int8"])
@pytest.mark.parametrize("how", ["where", "least", "causal and padding"])
def test_masks_mask(how: str, precision: Precision, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Masked(how)
    bundle = quick_export(model, tmp_path / "bundle", (6,), "onnxruntime", input_dtype="int64", tokens=12)
    x = np.random.default_rng(0).integers(1, 12, (8, 6))
    x[:4, 3:] = 0
    x[5] = 0
    check(model, bundle, precision, x, 0.01 if precision == "float16" else 0.1)


@pytest.mark.parametrize("larger", [1, 4])
@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_that_leave_the_range(name: str, larger: int, tmp_path: Path) -> None:
    """Also on inputs that are larger than those that the conversion has seen."""
    torch.manual_seed(0)
    model = Formula(name)
    x = larger * np.random.default_rng(0).standard_normal((8, WIDTH), np.float32)
    folded = check(model, quick_export(model, tmp_path / "bundle", (WIDTH,), "onnxruntime"), "float16", x, 0.02)
    types = stored(folded)
    assert {types[name] for name in ("body.weight", "head.weight")} == {TensorProto.FLOAT16}


def test_weights_beyond_the_range_stay_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Formula("layer norm")
    with torch.no_grad():
        model.body.x1.mul_(1e7)
    x = np.random.default_rng(0).standard_normal((8, WIDTH), np.float32)
    types = stored(check(model, quick_export(model, tmp_path / "bundle", (WIDTH,), "onnxruntime"), "float16", x, 0.01))
    assert (types["body.weight"], types["head.weight"]) == (TensorProto.FLOAT, TensorProto.FLOAT16)


def test_a_model_within_the_range_computes_in_float16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Linear(WIDTH, WIDTH, rank=3), nn.LayerNorm(WIDTH), nn.GELU(), nn.Linear(WIDTH, 3))
    x = np.random.default_rng(0).standard_normal((8, WIDTH), np.float32)
    folded = check(model, quick_export(model, tmp_path / "bundle", (WIDTH,), "onnxruntime"), "float16", x, 0.01)
    assert [node.op_type for node in folded.graph.node].count("Cast") == 2
