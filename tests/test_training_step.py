"""Laws of the step as plain ONNX: gradients of every operator, any batch, updates as in torch."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from norms import relative_error
from onnx import AttributeProto
from step_models import IMAGE, SEQUENCE, VECTOR, VOLUME, Formula, batch, export, gradient_of, net, run, weights_of
from torch import nn
from torch.nn import functional as F

from fedpara_edge.errors import InputError
from fedpara_edge.formats.bundle import ONNXRUNTIME_FILES
from fedpara_edge.nn import Conv2d, Linear

STEPS = (7, 3)
ONES = torch.tensor([1, 1])


class Scaled(nn.Module):
    """Parameters that are broadcast, divided by and chosen between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.rand(12) + 0.5), nn.Parameter(torch.randn(1, 12))
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.last = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.maximum(x * self.scale, self.b) / self.a - torch.minimum(self.b, x)
        return self.last(torch.where(x > 0, y, self.a * x))


class Pooled(nn.Module):
    """Maximum pooling of a ReLU, which is of use itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.relu()
        return F.max_pool2d(y, 3, 2, 1) + y[:, :, ::2, ::2]


class Recurrent(nn.Module):
    """A recurrent module on steps of 3 numbers, from zeros or from states that are trained, and a linear layer.

    `read` makes [B, ...] of the states [B, T, ...] and of the last state or states [layers, B, H].
    """

    def __init__(
        self, layers: nn.RNNBase, read: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], states: int = 0
    ) -> None:
        super().__init__()
        self.layers, self.read = layers, read
        count = layers.num_layers * (1 + layers.bidirectional)
        self.states = nn.ParameterList([torch.randn(count, 1, layers.hidden_size) for _ in range(states)])
        self.last = nn.LazyLinear(5)
        self(torch.zeros(2, *STEPS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = tuple(state.expand(-1, x.shape[0], -1).contiguous() for state in self.states)
        steps = x if self.layers.batch_first else x.transpose(0, 1)
        found, last = self.layers(steps, first[0] if len(first) == 1 else first or None)
        found = found if self.layers.batch_first else found.transpose(0, 1)
        return self.last(self.read(found, torch.cat(last, 2) if isinstance(last, tuple) else last))


def everything(found: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    return torch.cat([found.flatten(1), *last], 1)


class Vectors(nn.Module):
    """Products with vectors, on either side."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3))
        self.last = nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.view(-1, 3, 4)
        return self.last(torch.cat([x @ self.query, self.key @ x], 1) * (self.key @ self.key))


class Indices(nn.Module):
    """Uses where the largest entries are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, indices = F.max_pool1d(x, 2, return_indices=True)
        return y + (indices % 3).float()


class Positions(nn.Module):
    """Two tables looked up at constant positions, one of them at one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(4, 3), nn.Embedding(3, 3)
        self.register_buffer("positions", torch.tensor([[0, 1, 2, 3]]))
        self.last = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.first(self.positions) + self.second(self.positions // 2)
        return self.last(x.flatten(1))


MODELS = {
    "conv, stride": (lambda: net(nn.Conv2d(2, 9, 3, stride=2), nn.Tanh(), nn.Conv2d(9, 6, 3, stride=2)), IMAGE),
    "conv, stride and pad": (lambda: net(nn.Conv2d(2, 9, 4, 3, 2), nn.Tanh(), nn.Conv2d(9, 6, 3, 2, 1)), IMAGE),
    "conv, dilation": (lambda: net(nn.Conv2d(2, 9, 3, dilation=2), nn.Tanh(), nn.Conv2d(9, 4, 3, 1, 3, 3)), IMAGE),
    "conv, stride and dilation": (lambda: net(nn.Conv2d(2, 9, 3, 2, 2, 2), nn.Conv2d(9, 3, 2, 2, 1, 2)), IMAGE),
    "conv, narrowing": (lambda: net(nn.Conv2d(2, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 3, 5, padding=2)), IMAGE),
    "conv, widening": (lambda: net(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 16, 3)), IMAGE),
    "conv, oblong": (lambda: net(nn.Conv2d(2, 9, (1, 3)), nn.Conv2d(9, 6, (5, 1), (2, 1), (1, 0))), IMAGE),
    "conv, more pad than kernel": (lambda: net(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 3, padding=4)), IMAGE),
    "conv, small image": (lambda: net(nn.Conv2d(2, 9, 3, 3), nn.Tanh(), nn.Conv2d(9, 12, 3, padding=1)), IMAGE),
    "conv, pointwise": (lambda: net(nn.Conv2d(2, 9, 1), nn.Conv2d(9, 6, 1, stride=2, bias=False)), IMAGE),
    "conv, same": (lambda: net(nn.Conv2d(2, 9, (3, 5), padding="same"), nn.Conv2d(9, 3, 3, padding="valid")), IMAGE),
    "conv, groups": (lambda: net(nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 12, 3, 2, groups=4)), IMAGE),
    "conv, by channel": (lambda: net(nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 3, padding=1, groups=8)), IMAGE),
    "conv, by channel, strided": (
        lambda: net(nn.Conv2d(2, 6, (3, 2), (2, 3), (1, 0), groups=2), nn.Conv2d(6, 18, 2, 1, 1, groups=6)),
        IMAGE,
    ),
    "conv, by channel, dilated": (
        lambda: net(nn.Conv2d(2, 4, 2, 1, 1, 2, groups=2), nn.Conv2d(4, 4, 3, (1, 2), 2, (2, 1), groups=4)),
        IMAGE,
    ),
    "conv, by channel, same": (
        lambda: net(nn.Conv2d(2, 2, (3, 5), padding="same", groups=2), nn.Conv2d(2, 2, 3, 3, groups=2)),
        IMAGE,
    ),
    "conv, by channel, one dimension": (
        lambda: net(nn.Conv1d(3, 6, 3, 2, 1, groups=3), nn.Conv1d(6, 6, 2, 1, 1, 2, groups=6), shape=SEQUENCE),
        SEQUENCE,
    ),
    "conv, by channel, three dimensions": (
        lambda: net(nn.Conv3d(2, 4, 2, padding=1, groups=2), shape=(2, 4, 5, 6)),
        (2, 4, 5, 6),
    ),
    "conv, by channel, transposed": (
        lambda: net(nn.ConvTranspose2d(2, 4, 3, 2, 1, 1, groups=2), nn.ConvTranspose2d(4, 4, 2, groups=4)),
        IMAGE,
    ),
    "conv, one dimension": (
        lambda: net(nn.Conv1d(3, 8, 3, 2, 1), nn.Tanh(), nn.Conv1d(8, 4, 2, dilation=2), shape=SEQUENCE),
        SEQUENCE,
    ),
    "conv, three dimensions": (lambda: net(nn.Conv3d(1, 4, 2), nn.Conv3d(4, 3, 2), shape=(1, 4, 5, 6)), (1, 4, 5, 6)),
    "factored conv": (lambda: net(Conv2d(2, 16, 3, rank=3, stride=2), Conv2d(16, 9, 3, rank=3, tanh=True)), IMAGE),
    "max pool, tiles": (lambda: net(nn.Conv2d(2, 4, 3, padding=1), nn.MaxPool2d((1, 2))), IMAGE),
    "max pool, rest": (lambda: net(nn.Conv2d(2, 4, 3, padding=1), nn.MaxPool2d(3), nn.MaxPool2d(2)), IMAGE),
    "max pool, overlap": (lambda: net(nn.Conv2d(2, 4, 3), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, 1)), IMAGE),
    "max pool of relu": (lambda: net(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)), IMAGE),
    "max pool of relu in use": (lambda: net(nn.Conv2d(2, 4, 3, padding=1), Pooled()), IMAGE),
    "max pool, ceil": (lambda: net(nn.Conv2d(2, 4, 3, padding=1), nn.MaxPool2d(2, ceil_mode=True)), IMAGE),
    "max pool, dilation": (lambda: net(nn.Conv2d(2, 4, 3), nn.MaxPool2d(2, 1, dilation=2)), IMAGE),
    "max pool, three dimensions": (
        lambda: net(nn.Conv3d(2, 2, 1), nn.MaxPool3d(2), nn.Conv3d(2, 2, 1), nn.MaxPool3d(2, 1, 1), shape=VOLUME),
        VOLUME,
    ),
    "max pool, its indices in use": (lambda: net(nn.Conv1d(3, 4, 2), Indices(), shape=SEQUENCE), SEQUENCE),
    "max pool, one dimension": (lambda: net(nn.Conv1d(3, 4, 3), nn.MaxPool1d(2), shape=SEQUENCE), SEQUENCE),
    "group norm": (lambda: net(nn.GroupNorm(1, 2), nn.Conv2d(2, 6, 3), nn.GroupNorm(3, 6), nn.GroupNorm(6, 6)), IMAGE),
    "group norm of vectors": (lambda: nn.Sequential(nn.Linear(12, 12), nn.GroupNorm(4, 12), nn.Linear(12, 5)), VECTOR),
    "layer norm of images": (lambda: net(nn.Conv2d(2, 3, 3), nn.LayerNorm([3, 9, 10])), IMAGE),
    "factored linear": (
        lambda: net(Linear(12, 12, rank=3, kind="pfedpara"), Linear(12, 9, rank=2), shape=VECTOR),
        VECTOR,
    ),
    "broadcast and choose": (Scaled, VECTOR),
    "slices": (lambda: Formula(lambda x: torch.cat([x[:, 2:9], x[:, ::3], x.flip(1)[:, :4], x[:, 3:4]], 1)), VECTOR),
    "reshapes": (
        lambda: Formula(lambda x: x.view(-1, 3, 4).permute(0, 2, 1).unsqueeze(1).expand(-1, 2, -1, -1)),
        VECTOR,
    ),
    "splits": (lambda: Formula(lambda x: torch.stack([p * (i + 1) for i, p in enumerate(x.chunk(3, 1))], 1)), VECTOR),
    "pads": (lambda: Formula(lambda x: F.pad(x, (1, 2), value=0.5).square()), VECTOR),
    "powers": (lambda: Formula(lambda x: (x.abs() + 1) ** 1.5 + x.pow(3) + x**2), VECTOR),
    "powers that vary": (
        lambda: Formula(
            lambda x: (x.abs() + 0.5) ** x + 2.0**x + x.relu() ** x.relu() + x ** torch.tensor([0.0, 1.0, 2.0, 3.0] * 3)
        ),
        VECTOR,
    ),
    "equal entries, and a bound that varies": (
        lambda: Formula(lambda x: torch.minimum(x.relu(), x.relu().flip(1)) + x.clamp(min=x.mean(1, keepdim=True))),
        VECTOR,
    ),
    "detached": (lambda: Formula(lambda x: x * x.detach() + (x > 0).int().detach()), VECTOR),
    "prelu": (lambda: net(nn.Conv2d(2, 4, 3), nn.PReLU(4), nn.PReLU(), nn.ReLU(), nn.PReLU()), IMAGE),
    "transposed conv": (
        lambda: net(
            nn.ConvTranspose2d(2, 4, 3, 2, 1, 1),
            nn.Tanh(),
            nn.ConvTranspose2d(4, 6, (2, 3), (1, 2), groups=2, dilation=2, output_padding=(0, 1)),
        ),
        IMAGE,
    ),
    "transposed conv, one dimension": (
        lambda: net(nn.ConvTranspose1d(3, 4, 3, 3, 2, 1), nn.ConvTranspose1d(4, 2, 2, bias=False), shape=SEQUENCE),
        SEQUENCE,
    ),
    "upsampling": (
        lambda: net(
            nn.Conv2d(2, 4, 3),
            nn.Upsample(scale_factor=2),
            nn.Upsample((5, 13), mode="bilinear", align_corners=True),
            nn.Upsample(scale_factor=(1.5, 0.7), mode="bicubic"),
        ),
        IMAGE,
    ),
    "upsampling, volumes": (
        lambda: net(nn.Conv3d(2, 2, 2), nn.Upsample(scale_factor=2, mode="trilinear"), shape=VOLUME),
        VOLUME,
    ),
    "products over the batch": (
        lambda: Formula(lambda x: ((x @ x.T) @ x)[:, :12].view(-1, 3, 4) @ (x.T @ x)[:4, :4]),
        VECTOR,
    ),
    "scattered": (
        lambda: Formula(lambda x: x.scatter_add(1, x.argsort(1)[:, :3] % 2, x[:, :3]).index_add(1, ONES, x[:, :2])),
        VECTOR,
    ),
    "roots and logs": (
        lambda: Formula(lambda x: (x.square() + 1).sqrt().log() + (x.square() + 1).reciprocal()),
        VECTOR,
    ),
    "waves": (lambda: Formula(lambda x: x.sin() * x.cos() + torch.erf(x)), VECTOR),
    "softmax": (lambda: Formula(lambda x: x.softmax(1) + x.view(-1, 3, 4).log_softmax(1).flatten(1)), VECTOR),
    "clamp": (lambda: Formula(lambda x: x.clamp(-0.3, 0.4) + x.clamp(min=0.1)), VECTOR),
    "means": (lambda: Formula(lambda x: x - x.mean(1, keepdim=True) + x.view(-1, 3, 4).sum((1, 2))[:, None]), VECTOR),
    "vectors": (lambda: Vectors(), VECTOR),
    "gates": (lambda: Formula(lambda x: x * (x > 0).float() + x.round() + (x.argmax(1) == 3).float()[:, None]), VECTOR),
    "norms": (lambda: Formula(lambda x: F.normalize(x) + x.view(-1, 3, 4).logsumexp(2).repeat(1, 4)), VECTOR),
    "chosen entries": (
        lambda: Formula(lambda x: torch.gather(x, 1, x.argsort(1)[:, :4]) @ x.new_ones(4, 2).triu() + x[:, :1]),
        VECTOR,
    ),
    "masked classes": (lambda: Formula(lambda x: x.view(-1, 3, 4).tril().flatten(1)), VECTOR),
    "position embeddings": (Positions, (4, 3)),
    "layer norm of mixed rows": (
        lambda: Formula(lambda x: F.layer_norm(x.view(-1, 6, 2).reshape(-1, 4, 3), (3,)).view(-1, 6, 2)),
        VECTOR,
    ),
    "mean over the batch": (lambda: Formula(lambda x: x * x.mean(0)), VECTOR),
    "products": (lambda: Formula(lambda x: x.view(-1, 3, 4) @ x.view(-1, 3, 4).transpose(1, 2)), VECTOR),
    "recurrent, lstm": (lambda: Recurrent(nn.LSTM(3, 16, 2, batch_first=True), lambda y, _: y[:, -1]), STEPS),
    "recurrent, lstm, long": (lambda: Recurrent(nn.LSTM(3, 64), lambda y, _: y[:, -1]), (80, 3)),
    "recurrent, lstm, last": (lambda: Recurrent(nn.LSTM(3, 9), lambda _, last: last[0, :, 9:]), STEPS),
    "recurrent, lstm, all": (lambda: Recurrent(nn.LSTM(3, 6, 2, bidirectional=True), everything, 2), STEPS),
    "recurrent, gru": (lambda: Recurrent(nn.GRU(3, 16, 2, batch_first=True), lambda y, _: y[:, -1]), STEPS),
    "recurrent, gru, long": (lambda: Recurrent(nn.GRU(3, 64), lambda y, _: y[:, -1]), (80, 3)),
    "recurrent, gru, last": (lambda: Recurrent(nn.GRU(3, 9, bias=False), lambda _, last: last[-1]), STEPS),
    "recurrent, gru, all": (lambda: Recurrent(nn.GRU(3, 6, 2, bidirectional=True), everything, 1), STEPS),
    "recurrent, tanh": (lambda: Recurrent(nn.RNN(3, 6, 2, bidirectional=True), everything, 1), STEPS),
    "recurrent, relu": (
        lambda: Recurrent(nn.RNN(3, 16, 2, nonlinearity="relu", batch_first=True), lambda y, _: y[:, -1]),
        STEPS,
    ),
    "einsum": (lambda: Formula(lambda x: torch.einsum("bij,bkj->bik", x.view(-1, 3, 4), x.view(-1, 3, 4))), VECTOR),
}


def is_slow(name: str) -> bool:
    """Whether a model takes some seconds: all that recur but one."""
    return name.startswith("recurrent") and name != "recurrent, tanh"


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if is_slow(n) else n for n in MODELS])
def test_gradients_agree_with_torch_for_any_batch(name: str, tmp_path: Path) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(1)
    model = make()
    bundle = export(model, tmp_path, shape)
    for size in (1, 7):
        x, y = batch(shape, size)
        expected, found = gradient_of(model, x, y), run(bundle, x, y)
        assert relative_error(found["gradient"], expected) <= 2e-6, size
        np.testing.assert_array_equal(found["new_weights"], weights_of(bundle) - np.float32(0.1) * found["gradient"])


@pytest.mark.parametrize("pool", [(2,), (2, 1), (3, 2, 1), ((2, 3),)])
def test_the_first_of_equal_entries_gets_the_gradient_of_a_pool(pool: tuple[int, ...], tmp_path: Path) -> None:
    model = net(nn.Conv2d(1, 2, 1), nn.MaxPool2d(*pool), shape=(1, 4, 6))
    bundle = export(model, tmp_path, (1, 4, 6))
    x = np.random.default_rng(0).integers(0, 2, (8, 1, 4, 6)).astype(np.float32)  # nearly every window has ties
    x[:, :, 0] = np.arange(6)  # by position, so that the weight's gradient tells which entry was taken
    y = np.arange(8) % 5
    np.testing.assert_allclose(run(bundle, x, y)["gradient"], gradient_of(model, x, y), rtol=1e-5, atol=1e-7)


def test_only_operators_of_the_default_domain(tmp_path: Path) -> None:
    bundle = export(net(Conv2d(2, 8, 3, rank=2), nn.GroupNorm(2, 8), nn.MaxPool2d(2), nn.Dropout()), tmp_path, IMAGE)

    def nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
        inner = [a.g for node in graph.node for a in node.attribute if a.type == AttributeProto.GRAPH]
        return [*graph.node, *(node for graph in inner for node in nodes(graph))]

    for name in ONNXRUNTIME_FILES:
        model = onnx.load(bundle.file(name))
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
        assert {node.domain for node in nodes(model.graph)} == {""}
        assert model.ir_version == 10
        assert not model.functions
    assert "Dropout" not in {node.op_type for node in nodes(onnx.load(bundle.file("train_step.onnx")).graph)}


def test_parts_of_a_batch_add_up(tmp_path: Path) -> None:
    bundle = export(net(nn.Tanh(), shape=VECTOR), tmp_path, VECTOR)
    x, y = batch(VECTOR, 10)
    whole = run(bundle, x, y)
    first = run(bundle, x[:7], y[:7], share=np.float32(0.7), last=np.array(False))
    np.testing.assert_array_equal(first["new_weights"], weights_of(bundle))
    second = run(bundle, x[7:], y[7:], share=np.float32(0.3), accumulated=first["gradient"])
    for name in ("gradient", "new_weights"):
        np.testing.assert_allclose(second[name], whole[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("max_norm", [0.1, 100.0, np.inf])
def test_affine_term_and_clipping(max_norm: float, tmp_path: Path) -> None:
    bundle = export(net(nn.Tanh(), shape=VECTOR), tmp_path, VECTOR)
    x, y = batch(VECTOR, 6)
    weights = weights_of(bundle)
    h = np.random.default_rng(0).standard_normal(len(weights)).astype(np.float32)
    found = run(
        bundle, x, y, adjusted=np.array(True), mu=np.full(1, 0.3, np.float32), h=h, max_norm=np.float32(max_norm)
    )
    total = torch.nn.Parameter(torch.from_numpy(weights))
    total.grad = torch.from_numpy(found["gradient"] + np.float32(0.3) * weights + h)
    torch.nn.utils.clip_grad_norm_([total], max_norm)
    np.testing.assert_allclose(found["new_weights"], weights - 0.1 * total.grad.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "constants"),
    [("sgd", {"momentum": 0.9}), ("adamw", {}), ("adamw", {"weight_decay": 0.3, "eps": 1e-3})],
)
def test_optimizers_are_torchs(optimizer: str, constants: dict[str, float], tmp_path: Path) -> None:
    bundle = export(net(nn.Tanh(), shape=VECTOR), tmp_path, VECTOR, optimizer, **constants)
    parameter = torch.nn.Parameter(torch.from_numpy(weights_of(bundle)))
    reference = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]([parameter], lr=0.1, **constants)
    names = ["momentum"] if optimizer == "sgd" else ["moment1", "moment2"]
    state = {"weights": weights_of(bundle)} | {name: np.zeros_like(weights_of(bundle)) for name in names}
    if optimizer == "adamw":
        state["steps"] = np.float32(0)
    for size in (4, 5, 6):
        found = run(bundle, *batch(VECTOR, size), **state)
        parameter.grad = torch.from_numpy(found["gradient"])
        reference.step()
        state = {name: found[f"new_{name}"] for name in state}
        np.testing.assert_allclose(state["weights"], parameter.detach().numpy(), rtol=1e-5, atol=1e-6)
    kept = run(bundle, *batch(VECTOR, 4), **state, last=np.array(False))
    for name, value in state.items():
        np.testing.assert_array_equal(kept[f"new_{name}"], value)


class NamedLikeInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights, self.h = nn.Parameter(torch.randn(12)), nn.Parameter(torch.randn(12))
        self.new_weights = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.new_weights(x * self.weights + self.h)


def test_parameters_may_be_named_like_inputs_of_the_step(tmp_path: Path) -> None:
    export(NamedLikeInputs(), tmp_path, VECTOR)


def without_gradients(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = x * 2
    return x * y


UNCOVERED = {
    "sizes": (
        lambda: Formula(lambda x: torch.cat([x, x[:1]], 0)[:-1]),
        VECTOR,
        r"value 'cat': expected sizes in proportion to the batch",
    ),
    "dropout of all": (lambda: net(nn.Dropout(1.0), nn.Conv2d(2, 3, 3)), IMAGE, r"found .* ratio must be in the range"),
    "double precision": (
        lambda: Formula(lambda x: x.double().sin().float()),
        VECTOR,
        r"the model: .* found a Cast of float64 to float32, which",
    ),
    "deviation of a layer norm": (
        lambda: Formula(lambda x: torch.native_layer_norm(x, [12], None, None, 1e-5)[1] * x),
        VECTOR,
        r"found a LayerNormalization whose mean or deviation is in use, which",
    ),
    "scattered maxima": (
        lambda: Formula(lambda x: x.scatter_reduce(1, x.argsort(1)[:, :3], x[:, :3], "amax")),
        VECTOR,
        r"found a ScatterElements with reduction max, which",
    ),
    "padding of the output": (
        lambda: net(nn.ConvTranspose2d(2, 4, 3, dilation=2, output_padding=1)),
        IMAGE,
        r"module '0': .* found a ConvTranspose whose output is padded by its stride or more, which",
    ),
    "channels of the batch": (
        lambda: Formula(lambda x: F.max_pool1d(x.reshape(1, -1, 12), 2).reshape(-1, 6)),
        VECTOR,
        r"found TypeError: a pooling whose channels or sizes grow with the batch",
    ),
    "the batch twice": (
        lambda: Formula(lambda x: (x[:, None] * x[None]).repeat(1, 1, 2).sum(1)),
        VECTOR,
        r"found a shape with the batch in two dimensions, which",
    ),
    "no gradients": (lambda: Formula(without_gradients), VECTOR, r"found mul of trained values within torch.no_grad"),
    "fixed in the export": (lambda: Formula(lambda x: x * x.data), VECTOR, r"one that torch.onnx can export, found"),
    "a failure in the runtime": (
        lambda: Formula(lambda x: x.index_copy(0, torch.tensor([0]), x[:1] * 2)),
        VECTOR,
        r"expected to run in onnxruntime on any batch, found .*Dimension mismatch",
    ),
    "noise": (
        lambda: Formula(lambda x: x + torch.randn_like(x)),
        VECTOR,
        r"the model: .* found RandomNormalLike in evaluation",
    ),
    "a shared draw": (lambda: Formula(lambda x: x + torch.rand(12)), VECTOR, r"found RandomUniformLike"),
    "coins": (lambda: Formula(lambda x: x * torch.bernoulli(x.sigmoid())), VECTOR, r"found Bernoulli"),
    "samples": (lambda: Formula(lambda x: x + torch.multinomial(x.softmax(1), 1)), VECTOR, r"found Multinomial"),
}


@pytest.mark.parametrize("name", UNCOVERED)
def test_what_has_no_gradient_is_named(name: str, tmp_path: Path) -> None:
    make, shape, message = UNCOVERED[name]
    with pytest.raises(InputError, match=message) as caught:
        export(make(), tmp_path, shape)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
