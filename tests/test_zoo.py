"""The models of the zoo: their sizes, their shapes, and that they learn from the first step."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedpara_edge.errors import InputError
from fedpara_edge.factors.factorization import Factorization
from fedpara_edge.factors.layout import KINDS, Kind
from fedpara_edge.nn import (
    ZOO,
    FactoredLayer,
    ZooEntry,
    char_lstm,
    cnn,
    convert,
    har_transformer,
    layout_of,
    mlp,
    resnet18,
    vgg16,
)

torch.set_num_threads(1)  # the tensors are too small for threads to pay

TABLE_5_MILLIONS = {
    10: (15.25, 1.55, 2.33, 3.31, 4.45, 5.79, 7.33, 9.01, 10.90, 12.92),
    100: (15.30, 1.59, 2.38, 3.36, 4.50, 5.84, 7.38, 9.05, 10.94, 12.96),
}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def examples(entry: ZooEntry, rows: int, classes: int) -> torch.Tensor:
    """Inputs as the model takes them: tokens, or what the export makes of images and windows."""
    shape = (rows, *entry.input_shape)
    return torch.randint(classes, shape) if entry.input_dtype == "int64" else torch.randn(shape)


@pytest.mark.parametrize(("classes", "tenths"), [(10, 0), (10, 1), (10, 5), (100, 0), (100, 1)])
def test_vgg16_counts_of_table_5(classes: int, tenths: int) -> None:
    """The other columns differ in the ranks alone, which `test_rank.py` checks in full."""
    model = vgg16(classes, gamma=tenths / 10) if tenths else vgg16(classes, kind="dense")
    assert count(model) / 1e6 == pytest.approx(TABLE_5_MILLIONS[classes][tenths], abs=0.02)


def test_vgg16_layers() -> None:
    layers = layout_of(vgg16()).layers
    assert [layer.rank for layer in layers] == [0, 11, 13, 19, 22, 30, 30, 36, 52, 52, 52, 52, 52, 0, 0, 0]


@pytest.mark.parametrize(
    ("classes", "dense", "sent"),
    [(10, 203_530, 59_570), (62, 216_894, 63_646)],
)
def test_mlp_of_the_personalization_experiments(classes: int, dense: int, sent: int) -> None:
    """Figure 5: pFedPara sends 3.4 times fewer parameters at γ = 0.5."""
    layout = layout_of(mlp(classes, kind="pfedpara", gamma=0.5))
    assert count(mlp(classes, kind="dense")) == dense == layout.dense_parameters
    assert layout.shared_parameters == sent
    assert round(dense / sent, 1) == 3.4


def test_sizes() -> None:
    assert count(cnn(kind="dense")) / count(cnn()) > 9
    assert count(cnn(input_shape=(3, 32, 32), kind="dense")) / count(cnn(input_shape=(3, 32, 32))) > 8
    assert count(resnet18(kind="dense")) == 11_173_962
    assert count(resnet18(kind="dense")) / count(resnet18()) > 13


def test_char_lstm_has_the_share_of_table_2() -> None:
    """The paper's 19 % of the parameters are those of γ = 0; all that grows with the hidden size is factored."""
    dense, small = char_lstm(kind="dense"), char_lstm(gamma=0.0)
    assert 0.185 < count(small) / count(dense) < 0.195
    assert count(char_lstm(kind="lowrank", gamma=0.0)) <= count(small)
    layers = {layer.name: (layer.shape, layer.rank) for layer in layout_of(small).layers}
    assert layers == {
        "lstm.weight_ih_l0": ((1024, 8), 3),
        "lstm.weight_hh_l0": ((1024, 256), 16),
        "lstm.weight_ih_l1": ((1024, 256), 16),
        "lstm.weight_hh_l1": ((1024, 256), 16),
        "head": ((80, 256), 0),
    }


def test_the_projections_of_the_transformer_are_factored() -> None:
    model = har_transformer()
    assert 100_000 < count(har_transformer(kind="dense")) < 300_000
    factored = {name for name, module in model.named_modules() if isinstance(module, FactoredLayer)}
    assert factored == {f"blocks.{n}.{part}" for n in (0, 1) for part in ("attention", "output", "inner", "outer")}


def test_the_transformer_attends_to_positions() -> None:
    """Without its positions, the order of the patches would make no difference."""
    torch.manual_seed(0)
    model, x = har_transformer(kind="dense"), torch.randn(3, 100, 6)
    shuffled = x.reshape(3, 20, 5, 6).flip(1).reshape(3, 100, 6)
    assert (model(x) - model(shuffled)).abs().max() > 1e-4
    nn.init.zeros_(model.get_parameter("positions"))
    torch.testing.assert_close(model(x), model(shuffled))


def test_a_character_depends_on_those_before_it_alone() -> None:
    torch.manual_seed(0)
    model, x = char_lstm(20, (12,)), torch.randint(20, (3, 12))
    changed = x.clone()
    changed[:, 7] = (x[:, 7] + 1) % 20
    same = (model(x) == model(changed)).all(dim=1).all(dim=0)
    assert same.tolist() == [True] * 7 + [False] * 5


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("kind", KINDS)
def test_every_model_runs_in_every_kind(name: str, kind: Kind) -> None:
    entry = ZOO[name]
    model = entry.factory(7, kind=kind)
    assert any(isinstance(module, FactoredLayer) for module in model.modules()) == (kind != "dense")
    plain = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    assert plain == (kind == "dense" and entry.batchnorm != "refuse")
    outputs = model(examples(entry, 2, classes=7))
    assert outputs.shape == ((2, 7, *entry.input_shape) if entry.input_dtype == "int64" else (2, 7))
    assert not any(
        name in layer.name for layer in layout_of(model).layers for name in ("conv1.", "head.") if layer.rank
    )


@pytest.mark.parametrize("name", ZOO)
def test_converting_the_dense_model_gives_the_factored_one(name: str) -> None:
    entry = ZOO[name]
    converted, _ = convert(
        entry.factory(kind="dense"), Factorization(exclude=entry.dense_layers, gamma=0.3, batchnorm=entry.batchnorm)
    )
    assert layout_of(converted) == layout_of(entry.factory(gamma=0.3))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 40, 24)])
def test_other_shapes(shape: tuple[int, ...]) -> None:
    for factory in (mlp, cnn, resnet18):
        assert factory(5, shape)(torch.randn(2, *shape)).shape == (2, 5)
    assert mlp(5, (9, 6))(torch.randn(2, 9, 6)).shape == (2, 5)
    assert vgg16(5, (1, 64, 32), gamma=0)(torch.randn(1, 1, 64, 32)).shape == (1, 5)
    assert char_lstm(30, (9,))(torch.randint(30, (2, 9))).shape == (2, 30, 9)
    assert har_transformer(4, (50, 3))(torch.randn(2, 50, 3)).shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("vgg16", (1, 28, 28)),
        ("cnn", (28, 28)),
        ("cnn", (3, 8, 8)),
        ("resnet18", (0, 32, 32)),
        ("mobilenetv2", (3, 28, 28)),
        ("mobilenetv3-small", (32, 32)),
    ],
)
def test_impossible_shapes(name: str, shape: tuple[int, ...]) -> None:
    message = rf"{name}: expected an input shape \(channels, height, width\) of at least \d+x\d+, found "
    with pytest.raises(InputError, match=message):
        ZOO[name].factory(10, shape)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("char-lstm", (80, 8), r"\(characters,\) of at least 1"),
        ("char-lstm", (0,), r"\(characters,\) of at least 1"),
        ("har-transformer", (100,), r"\(steps, channels\) with a multiple of 5 steps"),
        ("har-transformer", (99, 6), r"\(steps, channels\) with a multiple of 5 steps"),
    ],
)
def test_impossible_sequences(name: str, shape: tuple[int, ...], expected: str) -> None:
    with pytest.raises(InputError, match=rf"{name}: expected an input shape {expected}, found "):
        ZOO[name].factory(10, shape)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tanh"), [*((kind, False) for kind in KINDS), ("fedpara", True)])
def test_characters_are_learned_from_the_first_step(kind: Kind, tanh: bool) -> None:
    """What follows in a text that repeats itself, well below the loss of chance of 1.39."""
    torch.manual_seed(0)
    text = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0]).repeat(4)
    windows = torch.stack([text[start : start + 13] for start in range(8)])
    model = char_lstm(4, (12,), kind=kind, tanh=tanh)
    optimizer = torch.optim.SGD(model.parameters(), lr=3.0)
    for _ in range(70):
        optimizer.zero_grad()
        F.cross_entropy(model(windows[:, :-1]), windows[:, 1:]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
    assert F.cross_entropy(model(windows[:, :-1]), windows[:, 1:]).item() < 0.7


@pytest.mark.parametrize(("kind", "tanh"), [*((kind, False) for kind in KINDS), ("fedpara", True)])
def test_activities_are_learned_from_the_first_step(kind: Kind, tanh: bool) -> None:
    """Four frequencies are told apart, well below the loss of chance of 1.39."""
    torch.manual_seed(0)
    labels = torch.arange(32) % 4
    angles = torch.arange(100) * (0.1 + 0.2 * labels[:, None]) + 6 * torch.rand(32, 1)
    windows = torch.stack([angles.sin(), angles.cos()], 2).repeat(1, 1, 3) + 0.3 * torch.randn(32, 100, 6)
    model = har_transformer(4, kind=kind, tanh=tanh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(windows), labels).backward()
        optimizer.step()
    assert F.cross_entropy(model(windows), labels).item() < 0.7


@pytest.mark.parametrize(("kind", "tanh"), [*((kind, False) for kind in KINDS), ("fedpara", True)])
@pytest.mark.parametrize(("name", "steps"), [("mlp", 30), ("cnn", 15)])
def test_training_starts_at_once(name: str, steps: int, kind: Kind, tanh: bool) -> None:
    """Four textures are told apart, well below the loss of chance of 1.39, within a few steps."""
    torch.manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(28), torch.arange(28), indexing="ij")
    textures = torch.stack([torch.sin(angle) for angle in (rows, columns, rows + columns, rows - columns)])
    labels = torch.arange(32) % 4
    images = (2 * textures[labels] + 0.5 * torch.randn(32, 28, 28)).unsqueeze(1)
    model = ZOO[name].factory(4, kind=kind, tanh=tanh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert F.cross_entropy(model(images), labels).item() < 0.7


@pytest.mark.slow
def test_deep_models_start_with_outputs_of_the_size_of_the_dense_ones() -> None:
    for factory in (vgg16, resnet18):
        sizes = {}
        for kind in KINDS:
            torch.manual_seed(0)
            sizes[kind] = factory(kind=kind)(torch.randn(4, 3, 32, 32)).std().item()
        assert 0.1 < sizes["dense"] < 10
        assert all(0.5 < size / sizes["dense"] < 2 for size in sizes.values()), sizes
