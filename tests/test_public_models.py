"""What public models do in `forward` or to their weights, and torch's own modules don't."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from step_models import export
from torch import nn

from fedpara_edge.errors import InputError
from fedpara_edge.factors.factorization import Factorization
from fedpara_edge.nn import convert

LENGTH, CHANNELS = 6, 8


class Made(nn.Module):
    """A function of the module and [B, 6, 8], and a linear layer."""

    def __init__(self, function: Callable[[nn.Module, torch.Tensor], torch.Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.function, self.head = function, nn.LazyLinear(3)
        for name, part in parts.items():
            self.add_module(name, part)
        self(torch.zeros(2, LENGTH, CHANNELS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.function(self, x).flatten(1))


def layer() -> nn.Module:
    return nn.Linear(CHANNELS, CHANNELS)


def block() -> nn.Module:
    return nn.TransformerEncoderLayer(CHANNELS, 2, 16, dropout=0.0, batch_first=True)


def zeros_of_its_own(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y, positions = model.layer(x), torch.tensor([0, 0, 1, 1, 2, 2])
    return torch.zeros(x.shape[0], 3, CHANNELS).index_add(1, positions, y)


def casts(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    kept = (x[..., :1] > 0).float()
    weights = torch.arange(LENGTH, dtype=torch.float32).expand(x.shape[0], 1, LENGTH)
    return torch.bmm(weights, model.layer(x) * kept).to(torch.float32)


def causal(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model.layer(x, nn.Transformer.generate_square_subsequent_mask(LENGTH).to(x))


def translation(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model.layer(x, x, tgt_mask=nn.Transformer.generate_square_subsequent_mask(LENGTH).to(x))


def distances(p: float) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    return lambda model, x: torch.exp(-torch.cdist(y := model.layer(x), y, p=p))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "part"),
    [
        (zeros_of_its_own, layer),
        (casts, layer),
        (causal, lambda: nn.TransformerEncoder(block(), 1, enable_nested_tensor=False)),
        (translation, lambda: nn.Transformer(CHANNELS, 2, 1, 1, 16, dropout=0.0, batch_first=True)),
        (distances(1.0), layer),
        (distances(2.0), layer),
    ],
    ids=["zeros", "casts", "causal mask", "decoder's mask", "cdist by 1", "cdist by 2"],
)
def test_models_verify(
    function: Callable[[nn.Module, torch.Tensor], torch.Tensor], part: Callable[[], nn.Module], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, _ = convert(Made(function, layer=part()), Factorization())
    export(model, tmp_path, (LENGTH, CHANNELS))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_either_spelling_of_weight_norm_is_the_same_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    old = nn.Sequential(nn.utils.weight_norm(nn.Linear(CHANNELS, 5), dim=None), nn.Tanh(), nn.Linear(5, 3))
    old[0].weight_g.data.neg_()
    x = torch.randn(4, CHANNELS)
    expected = old(x)  # from here on, the module holds a weight with a gradient
    new, _ = convert(old, Factorization())
    torch.testing.assert_close(new(x), expected)
    names = {name for name, _ in new.named_parameters()}
    assert {"0.parametrizations.weight.original0", "0.parametrizations.weight.original1"} < names
    assert hasattr(old[0], "weight_g")
    export(new, tmp_path, (CHANNELS,))


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_spectral_norm_is_refused_by_name(norm: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model, _ = convert(nn.Sequential(norm(nn.Linear(CHANNELS, 3))), Factorization())
    with pytest.raises(InputError, match=r"module '0.*': expected weights without spectral_norm"):
        export(model, tmp_path, (CHANNELS,))


def test_what_is_not_used_can_be_frozen(tmp_path: Path) -> None:
    model = Made(lambda _, x: x, unused=layer())
    with pytest.raises(InputError, match=r"parameter 'unused\.\w+': expected .* --freeze 'unused' "):
        export(convert(model, Factorization())[0], tmp_path, (LENGTH, CHANNELS))
    export(convert(model, Factorization(freeze=("unused",)))[0], tmp_path, (LENGTH, CHANNELS))


@pytest.mark.parametrize(
    ("function", "obstacle"),
    [
        (lambda model, x: torch.cdist(x, model.layer(x), p=3.0), r"torch\.cdist: expected p of 1 or 2, found 3"),
        (lambda model, x: torch.special.i0(model.layer(x)), r"bessel_i0, which has no translation to ONNX; replace it"),
        (lambda model, x: model.layer(x) if x.sum() > 0 else x, r"a branch on what a tensor holds"),
    ],
    ids=["cdist by 3", "special function", "branch"],
)
def test_obstacles_are_named(
    function: Callable[[nn.Module, torch.Tensor], torch.Tensor], obstacle: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=obstacle):
        export(Made(function, layer=layer()), tmp_path, (LENGTH, CHANNELS))
