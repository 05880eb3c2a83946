"""Federated optimizers: each is what its paper says, in both engines, through the files of a round."""

from __future__ import annotations

import functools
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import small_round
import torch
from command_line import Command
from norms import relative_error
from numpy.typing import NDArray
from small_net import CLASSES, SHAPE, SmallBundle, small_net, without_verification
from torch.nn import functional as F

from device_runtime import Adjustment, TrainConfig, open_data, open_engine, train
from device_runtime.batches import epoch_batches
from device_runtime.engines.protocol import Engine
from device_runtime.engines.registry import ENGINES
from device_runtime.epochs import count_steps
from device_runtime.schedule import learning_rate_at
from device_runtime.state import DeviceState
from export import export_bundle
from fedpara_edge.aggregation import AggregateConfig, aggregate, run_round
from fedpara_edge.algorithms import ClientAlgorithm, ServerAlgorithm, find_client, find_server
from fedpara_edge.algorithms.adaptive import FedAdagrad, FedAdam, FedYogi
from fedpara_edge.algorithms.fedavg import FedAvgClient, FedAvgServer
from fedpara_edge.algorithms.fedavgm import FedAvgM
from fedpara_edge.algorithms.feddyn import FedDynClient, FedDynServer
from fedpara_edge.algorithms.fedprox import FedProx
from fedpara_edge.algorithms.scaffold import ScaffoldClient, ScaffoldServer
from fedpara_edge.codecs import find_encoder
from fedpara_edge.errors import FedparaError, InputError, TooFewUpdatesError, WrongBundleError
from fedpara_edge.formats.bundle import WEIGHTS, Bundle, open_bundle
from fedpara_edge.formats.change import apply_change
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.formats.serverstate import ServerState, read_server_state, write_server_state
from fedpara_edge.formats.update import open_update
from fedpara_edge.formats.weights import Weights, read_weights, write_weights
from fedpara_edge.options import typed
from fedpara_edge.storage.rounds import round_path

TOLERANCE = 1e-5
EXAMPLES = (8, 20, 13)  # of the clients: 1, 3 and 2 batches an epoch
ROUNDS = ((0, 1, 2), (0, 2), (1, 2), (0, 1))  # who takes part
CONFIG = TrainConfig(epochs=2, batch_size=8, lr=0.5, seed=3, schedule="linear", lr_decay=0.9)
Tensors = dict[str, NDArray[Any]]

every_engine = pytest.mark.parametrize("engine", ENGINES)


def write_data(path: Path, client: int) -> Path:
    """Data that lean to other classes on each client."""
    generator = np.random.default_rng(client)
    x = generator.standard_normal((EXAMPLES[client], *SHAPE), np.float32)
    np.savez(path, x=x, y=(generator.integers(0, 3, EXAMPLES[client]) + client) % CLASSES)
    return path


@dataclass
class Federation:
    """A folder with a server and its clients, who share nothing but files."""

    folder: Path
    bundle: Bundle
    engine: str
    local: ClientAlgorithm
    server: ServerAlgorithm
    weights: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        (self.folder / "server").mkdir()
        self.weights = self.bundle.file(WEIGHTS)

    def open_engine(self) -> Engine:
        return open_engine(self.bundle, self.engine, threads=1)

    def state(self, client: int) -> DeviceState:
        return DeviceState(self.folder / f"state-{client}", self.bundle.manifest.fingerprint)

    def train(
        self,
        client: int,
        config: TrainConfig = CONFIG,
        *,
        engine: Engine | None = None,
        codec: str = "float32",
        **options: Any,
    ) -> Path:
        """One client's call; its update."""
        base = read_weights(self.weights)
        control = round_path(self.folder / "server", base.round)
        data = write_data(self.folder / f"{client}.npz", client)
        output = self.folder / f"{client}-{base.round}.safetensors"
        train(
            engine or self.open_engine(),
            open_data(data, self.bundle.manifest),
            self.weights,
            replace(config, algorithm=typed(self.local.name, self.local)),
            output=output,
            state=self.folder / f"state-{client}",
            client=f"client-{client}",
            server_state=control if self.local.controlled and control.exists() else None,
            encoder=find_encoder(codec),
            **options,
        )
        return output

    def round(self, clients: Sequence[int], config: TrainConfig = CONFIG, **options: Any) -> Weights:
        """A whole round; the next weights."""
        updates = [self.train(client, config, **options) for client in clients]
        output = self.folder / f"round-{read_weights(self.weights).round + 1}.safetensors"
        server = AggregateConfig(algorithm=typed(self.server.name, self.server), strict=True)
        done = run_round(updates, self.weights, output, server, state=self.folder / "server")
        self.weights = output
        return done.aggregation.weights

    def server_state(self) -> ServerState:
        return read_server_state(round_path(self.folder / "server", read_weights(self.weights).round))


class Reference:
    """The same federation in torch and float64, as the papers write it: with the weights y_i and not their changes."""

    def __init__(self, bundle: Bundle, local: ClientAlgorithm, server: ServerAlgorithm, folder: Path) -> None:
        self.manifest, self.local, self.server, self.folder = bundle.manifest, local, server, folder
        initial = {name: parameter.double() for name, parameter in small_net().named_parameters()}
        names = {tensor.name for tensor in bundle.manifest.layout.shared}
        self.x = {name: tensor.detach() for name, tensor in initial.items() if name in names}
        mine = {name: tensor.detach() for name, tensor in initial.items() if name not in names}
        self.personal = [dict(mine) for _ in EXAMPLES]
        self.own = [self.zeros() for _ in EXAMPLES]  # c_i or the gradients of feddyn
        self.kept = {group: self.zeros() for group in ("control", "h", "moment1", "moment2")}
        self.kept["moment2"] = {name: tensor + 1e-6 for name, tensor in self.zeros().items()}

    def zeros(self) -> dict[str, torch.Tensor]:
        return {name: torch.zeros_like(tensor) for name, tensor in self.x.items()}

    def train(self, client: int, round: int) -> tuple[dict[str, torch.Tensor], float]:
        """One client's trained shared weights, and the sum of its learning rates."""
        model = small_net().double()
        model.load_state_dict({**self.x, **self.personal[client]})
        dataset = open_data(write_data(self.folder / "data.npz", client), self.manifest)
        steps, number, rates = count_steps(dataset, CONFIG), 0, 0.0
        for epoch in range(CONFIG.epochs):
            order = {"batch_size": CONFIG.batch_size, "seed": CONFIG.seed, "epoch": round * CONFIG.epochs + epoch}
            for x, y in epoch_batches(dataset, **order):
                rate = learning_rate_at(CONFIG, step=number, steps=steps, epochs=CONFIG.epochs, round=round)
                model.zero_grad()
                F.cross_entropy(model(torch.from_numpy(x["x"]).double()), torch.from_numpy(y["y"])).backward()
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        gradient = parameter.grad
                        if name in self.x:
                            gradient = gradient + self.correction(client, name, parameter)
                        parameter -= rate * gradient
                number, rates = number + 1, rates + rate
        trained = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self.personal[client] = {name: trained.pop(name) for name in self.personal[client]}
        return trained, rates

    def correction(self, client: int, name: str, y: torch.Tensor) -> torch.Tensor:
        match self.local:
            case FedProx(mu=mu):
                return mu * (y - self.x[name])
            case ScaffoldClient():
                return self.kept["control"][name] - self.own[client][name]
            case FedDynClient(alpha=alpha):
                return alpha * (y - self.x[name]) - self.own[client][name]
        return torch.zeros_like(y)

    def round(self, clients: Sequence[int], round: int) -> None:
        trained = {client: self.train(client, round) for client in clients}
        old = [dict(own) for own in self.own]
        for client, (y, rates) in trained.items():
            for name, x in self.x.items():
                own = self.own[client]
                if isinstance(self.local, ScaffoldClient):
                    own[name] = own[name] - self.kept["control"][name] + (x - y[name]) / rates
                if isinstance(self.local, FedDynClient):
                    own[name] = own[name] - self.local.alpha * (y[name] - x)
        total = sum(EXAMPLES[client] for client in clients)
        for name, x in self.x.items():
            ys = [trained[client][0][name] for client in clients]
            weighted = sum(EXAMPLES[client] / total * y for client, y in zip(clients, ys, strict=True))
            mean = sum(ys) / len(ys)
            match self.server:
                case FedAvgServer():
                    self.x[name] = weighted
                case FedAdam(lr=lr, beta1=beta1, beta2=beta2, tau=tau):
                    delta = weighted - x
                    first, second = self.kept["moment1"], self.kept["moment2"]
                    first[name] = beta1 * first[name] + (1 - beta1) * delta
                    second[name] = beta2 * second[name] + (1 - beta2) * delta**2
                    self.x[name] = x + lr * first[name] / (second[name].sqrt() + tau)
                case ScaffoldServer(lr=lr, clients=count):
                    moves = sum(self.own[client][name] - old[client][name] for client in clients)
                    self.kept["control"][name] = self.kept["control"][name] + moves / count
                    self.x[name] = x + lr * (mean - x)
                case FedDynServer(alpha=alpha, clients=count):
                    h = self.kept["h"]
                    h[name] = h[name] - alpha / count * sum(y - x for y in ys)
                    self.x[name] = mean - h[name] / alpha


def distance(found: Mapping[str, Any], expected: Mapping[str, torch.Tensor], origin: Mapping[str, Any]) -> float:
    """Relative to how far the expected tensors are from the origin."""
    assert found.keys() == expected.keys()
    error = sum(float(np.square(found[name] - expected[name].numpy()).sum()) for name in expected)
    moved = sum(float(np.square(expected[name].numpy() - origin[name]).sum()) for name in expected)
    assert moved > 0
    return float(np.sqrt(error / moved))


PAIRS: dict[str, tuple[ClientAlgorithm, ServerAlgorithm]] = {
    "fedavg": (FedAvgClient(), FedAvgServer()),
    "fedprox": (FedProx(mu=0.7), FedAvgServer()),
    "fedprox and fedadam": (FedProx(mu=0.2), FedAdam(lr=0.05)),
    "scaffold": (ScaffoldClient(), ScaffoldServer(clients=3, lr=0.8)),
    "feddyn": (FedDynClient(alpha=0.3), FedDynServer(clients=3, alpha=0.3)),
}


@every_engine
@pytest.mark.parametrize("pair", PAIRS)
def test_rounds_agree_with_torch(pair: str, engine: str, small_bundle: SmallBundle, tmp_path: Path) -> None:
    local, server = PAIRS[pair]
    federation = Federation(tmp_path / "files", small_bundle(), engine, local, server)
    reference = Reference(federation.bundle, local, server, tmp_path)
    initial = read_weights(federation.weights).tensors
    for number, clients in enumerate(ROUNDS):
        found = federation.round(clients)
        reference.round(clients, number)
        assert distance(found.tensors, reference.x, initial) < TOLERANCE
    zeros = dict.fromkeys(initial, 0.0)
    for group in server.groups:
        assert distance(federation.server_state().groups[group], reference.kept[group], zeros) < TOLERANCE
    for client, own in enumerate(reference.own):
        committed = federation.state(client).committed()
        assert committed is not None
        personal = federation.bundle.read_initial_personal()
        assert distance(committed.after["personal"], reference.personal[client], personal) < TOLERANCE
        assert committed.after.keys() == {"personal", *([local.group] if local.group else [])}
        if local.group is not None:
            assert distance(committed.after[local.group], own, zeros) < TOLERANCE


def adaptive_reference(server: ServerAlgorithm, x: Any, deltas: Sequence[Any]) -> Any:
    """Algorithm 2 of Reddi et al., and momentum, in float64."""
    options = server.options()
    first = np.zeros_like(x)
    second = np.full_like(x, options.get("tau", 0) ** 2)
    for delta in deltas:
        match server:
            case FedAvgM():
                first = options["momentum"] * first + delta
                x = x + options["lr"] * first
                continue
            case FedAdagrad():
                second = second + delta**2
            case FedYogi():
                second = second - (1 - options["beta2"]) * delta**2 * np.sign(second - delta**2)
            case FedAdam():
                second = options["beta2"] * second + (1 - options["beta2"]) * delta**2
        first = options["beta1"] * first + (1 - options["beta1"]) * delta
        x = x + options["lr"] * first / (np.sqrt(second) + options["tau"])
    return x


OPTIMIZERS: tuple[ServerAlgorithm, ...] = (
    FedAvgM(),
    FedAvgM(lr=0.3, momentum=0.5),
    FedAdam(),
    FedAdam(lr=0.1, beta1=0.8, beta2=0.9, tau=0.01),
    FedYogi(),
    FedYogi(lr=0.02, beta2=0.9),
    FedAdagrad(),
    FedAdagrad(lr=0.3, beta1=0.9, tau=0.1),
)


@pytest.mark.parametrize("weighting", [None, "examples", "equal"])
@pytest.mark.parametrize("server", OPTIMIZERS, ids=str)
def test_server_optimizers_agree_with_numpy(server: ServerAlgorithm, weighting: Any, tmp_path: Path) -> None:
    weights, path = small_round.start_round(tmp_path, number=0), tmp_path / "base.safetensors"
    config = AggregateConfig(algorithm=typed(server.name, server), weighting=weighting, unbounded=("share",))
    initial = small_round.flat(weights.tensors)
    deltas = []
    for number in range(5):
        paths, changes, examples = [], [], np.array([10.0, 30.0, 5.0])
        for client, count in zip("abc", examples, strict=True):
            change = small_round.random_tensors(weights.layout, 10 * number + ord(client), 0.1 + 0.1 * number)
            changes.append(small_round.flat(change))
            paths.append(small_round.send(tmp_path, weights, client, change=change, examples=int(count)))
        shares = np.full(3, 1 / 3) if weighting == "equal" else examples / examples.sum()
        deltas.append(shares @ np.stack(changes))
        done = run_round(paths, path, tmp_path / f"{number}.safetensors", config, state=tmp_path / "state", keep=2)
        path = done.output
        weights = read_weights(path)
        expected = adaptive_reference(server, initial, deltas)
        assert relative_error(small_round.flat(weights.tensors) - initial, expected - initial) < TOLERANCE
    assert set(read_server_state(round_path(tmp_path / "state", 5)).groups) == set(server.groups)


def test_the_learning_rate_of_the_server_multiplies_the_mean(tmp_path: Path) -> None:
    weights = small_round.start_round(tmp_path)
    paths = [small_round.send(tmp_path, weights, client) for client in "abc"]
    base = small_round.flat(weights.tensors)
    moved = small_round.flat(aggregate(paths, weights).weights.tensors) - base
    for lr in (0.5, 1.7):
        result = aggregate(paths, weights, algorithm=FedAvgServer(lr=lr))
        assert result.state is None
        np.testing.assert_allclose(small_round.flat(result.weights.tensors) - base, lr * moved, atol=1e-6)


@pytest.mark.parametrize("codec", ["float32", "int4"])
@pytest.mark.parametrize("name", ["scaffold", "feddyn"])
def test_the_server_keeps_the_mean_of_what_the_devices_keep(
    name: str, codec: str, small_bundle: SmallBundle, tmp_path: Path
) -> None:
    federation = Federation(tmp_path / "files", small_bundle(), "onnxruntime", *PAIRS[name])
    group = federation.local.group
    assert group is not None
    for clients in ROUNDS:
        federation.round(clients, codec=codec)
        (kept,) = federation.server_state().groups.values()
        own = [committed.after[group] for c in range(3) if (committed := federation.state(c).committed()) is not None]
        for tensor, value in kept.items():
            mean = sum(np.asarray(tensors[tensor], np.float64) for tensors in own) / 3
            np.testing.assert_allclose(value, mean, atol=1e-6 * np.abs(mean).max())
    committed = federation.state(0).committed()
    assert committed is not None
    assert ("residual" in committed.after) == (codec == "int4")


@every_engine
def test_the_first_round_of_scaffold_is_fedavg(engine: str, small_bundle: SmallBundle, tmp_path: Path) -> None:
    updates = {}
    for local in (FedAvgClient(), ScaffoldClient()):
        server = ScaffoldServer(clients=3)
        federation = Federation(tmp_path / local.name, small_bundle(), engine, local, server)
        updates[local.name] = [federation.train(client) for client in range(3)]
    base = read_weights(small_bundle().file(WEIGHTS))
    plain = aggregate(updates["fedavg"], base, weighting="equal")
    scaffold = aggregate(updates["scaffold"], base, algorithm=server)
    for name, tensor in plain.weights.tensors.items():
        np.testing.assert_array_equal(scaffold.weights.tensors[name], tensor)
    for path in updates["fedavg"]:
        update = open_update(path, base)
        update.close()
        assert update.header.metrics.keys() == {"loss", "first_epoch_loss"}


def test_the_first_round_of_feddyn_goes_twice_as_far(small_bundle: SmallBundle, tmp_path: Path) -> None:
    server = FedDynServer(clients=3, alpha=0.3)
    federation = Federation(tmp_path / "files", small_bundle(), "onnxruntime", FedDynClient(alpha=0.3), server)
    base = read_weights(federation.weights)
    updates = [federation.train(client) for client in range(3)]
    mean = aggregate(updates, base, weighting="equal").weights
    moved = aggregate(updates, base, algorithm=server).weights
    for name, tensor in base.tensors.items():
        np.testing.assert_allclose(moved.tensors[name] - tensor, 2 * (mean.tensors[name] - tensor), atol=1e-6)


def test_a_device_that_comes_late_starts_from_nothing(small_bundle: SmallBundle, tmp_path: Path) -> None:
    federation = Federation(
        tmp_path / "files", small_bundle(), "onnxruntime", ScaffoldClient(), ScaffoldServer(clients=3)
    )
    federation.round((0, 1))
    federation.train(2)
    committed = federation.state(2).committed()
    assert committed is not None
    assert "control" not in committed.before
    assert "control" in committed.after


class Interrupted:
    """An engine that is interrupted after some steps."""

    def __init__(self, engine: Engine, after: int) -> None:
        self.engine, self.left, self.name, self.bundle = engine, after, engine.name, engine.bundle

    def step(self, *batch: Any, **options: Any) -> float:
        loss = self.engine.step(*batch, **options)
        self.left -= 1
        if not self.left:
            signal.raise_signal(signal.SIGINT)
        return loss

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


@pytest.mark.parametrize("name", ["scaffold", "feddyn"])
def test_what_is_kept_survives_interruptions_and_repetitions(
    name: str, small_bundle: SmallBundle, tmp_path: Path
) -> None:
    federation = Federation(tmp_path / "files", small_bundle(), "onnxruntime", *PAIRS[name])
    federation.round((0, 1, 2))
    before = tmp_path / "before"
    shutil.copytree(federation.folder, before)
    output = federation.train(1)
    state = federation.folder / "state-1" / "lasting.safetensors"
    expected = output.read_bytes(), state.read_bytes()
    for _ in range(2):
        federation.train(1, overwrite=True)
        assert (output.read_bytes(), state.read_bytes()) == expected
    for after in (1, 4):
        shutil.rmtree(federation.folder)
        shutil.copytree(before, federation.folder)
        with pytest.raises(KeyboardInterrupt):
            federation.train(1, engine=Interrupted(federation.open_engine(), after))
        federation.train(1)
        assert (output.read_bytes(), state.read_bytes()) == expected


def test_another_call_of_a_round_takes_the_place_of_the_first(small_bundle: SmallBundle, tmp_path: Path) -> None:
    federation = Federation(tmp_path / "files", small_bundle(), "onnxruntime", *PAIRS["scaffold"])
    federation.round((0, 1, 2))

    def kept(moment: str) -> Any:
        committed = federation.state(1).committed()
        assert committed is not None
        return getattr(committed, moment)["control"]["0.x1"]

    first = kept("after")
    federation.train(1, replace(CONFIG, lr=0.01))
    np.testing.assert_array_equal(kept("before"), first)
    wrong = kept("after")
    federation.train(1, overwrite=True)
    np.testing.assert_array_equal(kept("before"), first)
    assert not np.array_equal(kept("after"), wrong)


@every_engine
def test_personal_tensors_are_pulled_nowhere(engine: str, small_bundle: SmallBundle, tmp_path: Path) -> None:
    trained = {}
    for local in (FedAvgClient(), FedProx(mu=5.0)):
        federation = Federation(tmp_path / local.name, small_bundle(), engine, local, FedAvgServer())
        config = replace(CONFIG, epochs=1, batch_size=32, schedule="constant", lr_decay=1.0)
        base = read_weights(federation.weights)
        update = open_update(federation.train(1, config), base)
        change = np.empty(base.layout.shared_parameters, np.float32)
        update.decoder.decode(0, change)
        update.close()
        committed = federation.state(1).committed()
        assert committed is not None
        trained[local.name] = change, committed.after["personal"]
    # In the first step μ (w - x) is 0, so both take the same; had μ pulled at the personal tensors, they would differ.
    np.testing.assert_allclose(trained["fedprox"][0], trained["fedavg"][0], atol=1e-6)
    for name, tensor in trained["fedavg"][1].items():
        np.testing.assert_allclose(trained["fedprox"][1][name], tensor, atol=1e-6)


@pytest.fixture
def older(small_bundle: SmallBundle, tmp_path: Path) -> Bundle:
    """A bundle of a release whose graph takes one μ for all tensors."""
    shutil.copytree(small_bundle().path, tmp_path / "older")
    bundle = open_bundle(tmp_path / "older")
    path = bundle.file("train_step.onnx")
    model = onnx.load(path)
    (mu,) = (entry for entry in model.graph.input if entry.name == "mu")
    del mu.type.tensor_type.shape.dim[:]
    onnx.save(model, path)
    return bundle


def test_an_older_graph_takes_one_mu_and_refuses_another(older: Bundle, small_bundle: SmallBundle) -> None:
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((6, *SHAPE), np.float32), generator.integers(0, CLASSES, 6)
    engines = [open_engine(bundle, "onnxruntime", threads=1) for bundle in (older, small_bundle())]
    for engine in engines:
        for adjustment in (Adjustment(max_norm=0.1), Adjustment(mu=0.3), Adjustment(mu=0.3, mu_of=engine.read())):
            engine.step(x, y, learning_rate=0.1, seed=0, adjustment=adjustment)
    for name, tensor in engines[0].read().items():
        np.testing.assert_array_equal(tensor, engines[1].read()[name])
    some = Adjustment(mu=0.3, mu_of=["0.x1"])
    engines[1].step(x, y, learning_rate=0.1, seed=0, adjustment=some)
    with pytest.raises(
        WrongBundleError, match=r"train_step.onnx: expected a graph that takes a different mu .*; export"
    ):
        engines[0].step(x, y, learning_rate=0.1, seed=0, adjustment=some)


@every_engine
def test_mu_of_an_unknown_tensor_is_refused(engine: str, small_bundle: SmallBundle) -> None:
    x, y = np.zeros((2, *SHAPE), np.float32), np.zeros(2, np.int64)
    running = open_engine(small_bundle(), engine, threads=1)
    with pytest.raises(InputError, match="tensor 'nobody': expected the name of a trained tensor"):
        running.step(x, y, learning_rate=0.1, seed=0, adjustment=Adjustment(mu=0.3, mu_of=["nobody"]))


def bytes_of(tensors: Mapping[str, NDArray[Any]]) -> Iterator[bytes]:
    """What to look for in a file: some entries of each tensor."""
    for tensor in tensors.values():
        flat = np.asarray(tensor, "<f4").reshape(-1)
        yield flat[: min(2, flat.size)].tobytes()


@pytest.fixture(scope="module")
def fedper(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The small network with its last layer personal."""
    options = ExportConfig(name="small", input_shape=SHAPE, input_dtype="float32", personal=("6",))
    with without_verification():
        return export_bundle(small_net(), tmp_path_factory.mktemp("fedper") / "bundle", options)[0]


@pytest.mark.parametrize("model", ["pfedpara", "fedper"])
@pytest.mark.parametrize("pair", PAIRS)
def test_no_personal_tensor_is_in_an_update(
    pair: str, model: str, small_bundle: SmallBundle, fedper: Bundle, tmp_path: Path
) -> None:
    bundle = small_bundle() if model == "pfedpara" else fedper
    names = {"6.x2", "6.y2"} | ({"6.x1", "6.y1", "6.bias"} if model == "fedper" else set())
    federation = Federation(tmp_path / "files", bundle, "onnxruntime", *PAIRS[pair])
    federation.round((0, 1, 2))
    content = federation.train(1).read_bytes()
    committed = federation.state(1).committed()
    assert committed is not None
    for moment in (committed.before, committed.after):
        assert moment["personal"].keys() == names
        for group, tensors in moment.items():
            assert all(needle not in content for needle in bytes_of(tensors)), group
    update = open_update(federation.folder / "1-1.safetensors", read_weights(federation.weights))
    update.close()
    trained = {tensor.name for tensor in bundle.manifest.layout.with_role("shared", "personal")}
    assert set(update.file.entries) == trained - names
    shared = read_weights(federation.weights)
    assert shared.tensors.keys() == trained - names
    assert sum(entry.nbytes for entry in update.file.entries.values()) == 4 * shared.layout.shared_parameters


def test_the_algorithm_decides_the_call() -> None:
    calls = [replace(CONFIG, algorithm=algorithm).decisive() for algorithm in ("fedavg", "fedprox", "fedprox:mu=1")]
    assert [call["algorithm"] for call in calls] == [
        {"name": "fedavg"},
        {"name": "fedprox", "mu": 0.1},
        {"name": "fedprox", "mu": 1.0},
    ]


REFUSED_LOCAL: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown": ("fedsgd", {}, "algorithm: expected one of fedavg, fedprox, scaffold, feddyn, found 'fedsgd'"),
    "mu of fedavg": (
        "fedavg",
        {"mu": 0.1},
        "algorithm: fedavg: mu: expected an option of it, found an unknown one; it has none",
    ),
    "alpha of scaffold": (
        "scaffold",
        {"alpha": 1.0},
        "algorithm: scaffold: alpha: expected an option of it, found an unknown one",
    ),
    "mu below 0": ("fedprox", {"mu": -1.0}, "algorithm: fedprox: mu: expected a number of at least 0, found -1.0"),
    "alpha of 0": ("feddyn", {"alpha": 0.0}, "algorithm: feddyn: alpha: expected a positive number, found 0.0"),
    "mu infinite": ("fedprox", {"mu": float("inf")}, "mu: expected a number of at least 0, found inf"),
}
REFUSED_SERVER: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown": ("fedprox", {}, "algorithm: expected one of fedavg, fedavgm, fedadam, .* found 'fedprox'"),
    "momentum of fedavg": (
        "fedavg",
        {"momentum": 0.5},
        "momentum: expected an option of it, found an unknown one; it has lr",
    ),
    "lr of feddyn": (
        "feddyn",
        {"clients": 2, "lr": 1.0},
        "lr: expected an option of it, found an unknown one; it has clients, alpha",
    ),
    "beta2 of fedadagrad": (
        "fedadagrad",
        {"beta2": 0.5},
        "beta2: expected an option of it, found an unknown one; it has lr, beta1, tau",
    ),
    "no clients": ("scaffold", {}, "clients: expected an integer of at least 1, found none; write scaffold:clients=…"),
    "clients of 0": ("feddyn", {"clients": 0}, "clients: expected an integer of at least 1, found 0"),
    "lr of 0": ("fedadam", {"lr": 0.0}, "lr: expected a positive number, found 0.0"),
    "momentum of 1": ("fedavgm", {"momentum": 1.0}, "momentum: expected a number of at least 0 and below 1"),
    "beta1 of 1": ("fedyogi", {"beta1": 1.0}, "beta1: expected a number of at least 0 and below 1"),
    "beta2 below 0": ("fedadam", {"beta2": -0.1}, "beta2: expected a number of at least 0 and below 1"),
    "tau of 0": ("fedadagrad", {"tau": 0.0}, "tau: expected a number above 0 and below"),
}


def text_of(name: str, options: Mapping[str, Any]) -> str:
    typed_options = ",".join(f"{option}={value}" for option, value in options.items())
    return f"{name}:{typed_options}" if options else name


@pytest.mark.parametrize("case", REFUSED_LOCAL)
def test_local_options_that_do_not_fit_are_refused(case: str) -> None:
    name, options, message = REFUSED_LOCAL[case]
    with pytest.raises(InputError, match=message):
        find_client(text_of(name, options))


@pytest.mark.parametrize("case", REFUSED_SERVER)
def test_server_options_that_do_not_fit_are_refused(case: str) -> None:
    name, options, message = REFUSED_SERVER[case]
    with pytest.raises(InputError, match=message):
        find_server(text_of(name, options))


@pytest.mark.parametrize(("optimizer", "found"), [("momentum", "momentum 0.9"), ("adamw", "adamw")])
def test_scaffold_refuses_other_optimizers_than_plain_sgd(
    optimizer: str, found: str, small_bundle: SmallBundle, tmp_path: Path
) -> None:
    federation = Federation(tmp_path / "files", small_bundle(optimizer), "onnxruntime", *PAIRS["scaffold"])
    with pytest.raises(InputError, match=f"optimizer: expected plain sgd with algorithm scaffold, found {found}; exp"):
        federation.train(0)


def test_an_algorithm_that_keeps_something_needs_a_folder(tmp_path: Path) -> None:
    from softmax_regression import SoftmaxRegression, make_bundle, write_npz

    bundle = make_bundle(tmp_path / "bundle", personal=False)
    dataset = open_data(write_npz(tmp_path / "data.npz"), bundle.manifest)
    config = TrainConfig(algorithm="feddyn")
    call = functools.partial(
        train, SoftmaxRegression(bundle), dataset, bundle.file(WEIGHTS), output=tmp_path / "update"
    )
    with pytest.raises(InputError, match="algorithm feddyn: expected a folder for what the device keeps, found none"):
        call(config)
    with pytest.raises(InputError, match="expected a control variate with algorithm scaffold, found fedprox"):
        call(TrainConfig(algorithm="fedprox"), server_state=tmp_path / "round-1")


def test_a_device_takes_the_control_variate_of_its_round_only(small_bundle: SmallBundle, tmp_path: Path) -> None:
    federation = Federation(tmp_path / "files", small_bundle(), "onnxruntime", *PAIRS["scaffold"])
    federation.round((0, 1))
    path = round_path(federation.folder / "server", 1)
    good = read_server_state(path)
    path.unlink()
    with pytest.raises(
        InputError, match=r"expected the server's control variate of round 1, found none; .* --server-state"
    ):
        federation.train(0)
    wrong: dict[str, tuple[ServerState, type[FedparaError], str]] = {
        "round": (replace(good, round=2), WrongBundleError, "server state: round: expected 1 as the weights"),
        "base": (replace(good, base="0" * 64), WrongBundleError, "server state: base: expected"),
        "bundle": (replace(good, fingerprint="0" * 64), WrongBundleError, "server state: fingerprint: expected"),
        "algorithm": (
            replace(good, algorithm="fedavgm", options={}, groups={"momentum": good.groups["control"]}),
            WrongBundleError,
            "expected the server state of algorithm scaffold, found that of fedavgm",
        ),
        "tensor": (
            replace(good, groups={"control": {**good.groups["control"], "0.x1": np.zeros(3, np.float32)}}),
            WrongBundleError,
            r"tensor 'control/0.x1': expected shape \(8, 2\), found \(3,\)",
        ),
    }
    for state, error, message in wrong.values():
        write_server_state(path, state)
        with pytest.raises(error, match=message):
            federation.train(0)
    write_server_state(path, good)
    federation.train(0)


def test_a_server_refuses_what_another_algorithm_trained(small_bundle: SmallBundle, tmp_path: Path) -> None:
    bundle = small_bundle()
    base = read_weights(bundle.file(WEIGHTS))
    cases: list[tuple[ClientAlgorithm, ServerAlgorithm, str]] = [
        (
            FedAvgClient(),
            ScaffoldServer(clients=3),
            "expected a metric learning_rate_sum from 1e-30 to .* scaffold, found none",
        ),
        (FedProx(), FedDynServer(clients=3), "expected metric alpha 0.1 for algorithm feddyn, found none; train with"),
        (FedDynClient(alpha=0.2), FedDynServer(clients=3), "expected metric alpha 0.1 for algorithm feddyn, found 0.2"),
    ]
    for number, (local, server, message) in enumerate(cases):
        federation = Federation(tmp_path / f"{number}", bundle, "onnxruntime", local, server)
        with pytest.raises(TooFewUpdatesError, match=message) as caught:
            aggregate([federation.train(0)], base, algorithm=server)
        assert [error.code for error in caught.value.rejected] == ["wrong_algorithm"]


def test_state_must_be_there_and_of_the_same_algorithm(tmp_path: Path) -> None:
    weights = small_round.start_round(tmp_path, number=0)
    result = aggregate([small_round.send(tmp_path, weights, "a")], weights, algorithm=FedAdam())
    write_weights(tmp_path / "next", result.weights)
    following = read_weights(tmp_path / "next")
    update = small_round.send(tmp_path, following, "a")
    with pytest.raises(InputError, match="algorithm fedadam: expected the server state of round 1, found none; give"):
        aggregate([update], following, algorithm=FedAdam())
    with pytest.raises(InputError, match="algorithm: expected fedadam as in round 1, found fedyogi; go on as"):
        aggregate([update], following, algorithm=FedYogi(), state=result.state)
    with pytest.raises(InputError, match=r"beta1: expected 0.9 as in round 1, found 0.5; go on as"):
        aggregate([update], following, algorithm=FedAdam(beta1=0.5), state=result.state)
    assert aggregate([update], following, algorithm=FedAdam(lr=0.5), state=result.state).weights.round == 2
    with pytest.raises(WrongBundleError, match="server state: round: expected 0 as the weights have it, found 1; take"):
        aggregate([small_round.send(tmp_path, weights, "a")], weights, algorithm=FedAdam(), state=result.state)


def test_more_updates_than_clients_are_refused(tmp_path: Path) -> None:
    weights = small_round.start_round(tmp_path, number=0)
    metrics = {"learning_rate_sum": 0.5}
    paths = [small_round.send(tmp_path, weights, client, metrics=metrics) for client in "abc"]
    with pytest.raises(InputError, match="clients: expected at least as many as the 3 that take part, found 2; give"):
        aggregate(paths, weights, algorithm=ScaffoldServer(clients=2))


class Typing:
    """A person who runs a federation from the command line."""

    def __init__(self, run: Command, bundle: Bundle, folder: Path) -> None:
        self.run, self.bundle, self.folder = run, bundle, folder
        for client in range(3):
            write_data(folder / f"{client}.npz", client)

    def weights(self, round: int) -> Path:
        return self.folder / f"round-{round}.safetensors" if round else self.bundle.file(WEIGHTS)

    def train(self, client: int, round: int, *options: object) -> Any:
        return self.run(
            *("train", self.bundle.path, "--data", self.folder / f"{client}.npz", "--weights", self.weights(round)),
            *("--state", self.folder / f"state-{client}", "--engine", "onnxruntime", "--threads", 1, "--lr", 0.1),
            *("-o", self.folder / f"{round}-{client}.update", "--client", f"c{client}", *options, "--json"),
        )

    def aggregate(self, round: int, *options: object, config: object = None) -> Any:
        return self.run(
            *(() if config is None else ("--config", config)),
            *("aggregate", *sorted(self.folder.glob(f"{round}-*.update")), "--weights", self.weights(round)),
            *("-o", self.weights(round + 1), *options, "--json"),
        )


COMMANDS: dict[str, tuple[Callable[[Path, int], tuple[object, ...]], tuple[object, ...]]] = {
    "fedprox": (lambda *_: ("--algorithm", "fedprox:mu=0.3"), ("--algorithm", "fedavg:lr=0.9")),
    "scaffold": (
        lambda folder, round: (
            *("--algorithm", "scaffold"),
            *(("--server-state", folder / "server" / f"round-{round}.safetensors") if round else ()),
        ),
        ("--algorithm", "scaffold", "--clients", 3, "--state", "server", "--weighting", "examples"),
    ),
    "feddyn": (
        lambda *_: ("--algorithm", "feddyn:alpha=0.3"),
        ("--algorithm", "feddyn:alpha=0.3", "--clients", 3, "--state", "server"),
    ),
    "fedyogi": (lambda *_: (), ("--algorithm", "fedyogi:tau=0.01,beta1=0.5", "--state", "server")),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_federation_from_the_command_line(
    name: str, run: Command, small_bundle: SmallBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    person = Typing(run, small_bundle(), tmp_path)
    of_device, of_server = COMMANDS[name]
    for round in range(2):
        for client in range(2):
            assert person.train(client, round, *of_device(tmp_path, round)).code == 0
        ended = person.aggregate(round, *of_server)
        assert ended.code == 0, ended.err
        assert ended.json["round"] == round + 1
    told = ended.json["algorithm"]
    assert told["name"] == ("fedavg" if name == "fedprox" else name)
    assert ended.json["weighting"] == ("equal" if name == "feddyn" else "examples")
    if told["name"] != "fedavg":
        assert sorted(path.name for path in (tmp_path / "server").glob("*.safetensors")) == [
            "round-1.safetensors",
            "round-2.safetensors",
        ]
        assert read_server_state(Path("server/round-2.safetensors")).base == read_weights(person.weights(2)).base
        assert run("inspect", "server/round-2.safetensors", "--json").json["algorithm"]["name"] == name


@pytest.mark.parametrize("algorithm", ["fedavg", "fedadam"])
def test_a_lossy_downlink_sends_what_it_left_out(
    algorithm: str, run: Command, small_bundle: SmallBundle, tmp_path: Path
) -> None:
    person, server = Typing(run, small_bundle(), tmp_path), tmp_path / "server"
    codecs = ("int4", "int4", "float32")
    for round, codec in enumerate(codecs):
        assert person.train(0, round).code == 0
        base, updates = read_weights(person.weights(round)), [tmp_path / f"{round}-0.update"]
        state = read_server_state(round_path(server, round)) if round else None
        change, options = tmp_path / f"{round}.change", ("--algorithm", algorithm, "--state", server)
        if state is not None:
            ended = person.aggregate(round, *options)
            assert (ended.code, "--downlink-codec: expected one as in the round before" in ended.err) == (2, True)
        ended = person.aggregate(round, *options, "--downlink-codec", codec, "--change", change)
        assert ended.code == 0, ended.err
        assert ended.json["change_bytes"] == change.stat().st_size
        published = read_weights(person.weights(round + 1))
        write_weights(tmp_path / "applied", apply_change(base, change))
        assert (tmp_path / "applied").read_bytes() == person.weights(round + 1).read_bytes()
        kept = read_server_state(round_path(server, round + 1))
        kept.check_weights(published)
        meant = aggregate(updates, base, algorithm=find_server(algorithm), state=state).weights.tensors
        residual = kept.groups.get("residual")
        assert (residual is None) == (codec == "float32")
        for name, tensor in meant.items():
            left_before = state.groups["residual"][name] if state is not None else 0.0
            left = residual[name] if residual is not None else 0.0
            np.testing.assert_allclose(published.tensors[name] + left, tensor + left_before, atol=1e-6)
    assert person.train(0, 3).code == 0
    assert person.aggregate(3, "--algorithm", algorithm, "--state", server).code == 0


def test_clients_are_evaluated_one_by_one_and_together(run: Command, small_bundle: SmallBundle, tmp_path: Path) -> None:
    person = Typing(run, small_bundle(), tmp_path)
    for client in range(3):
        assert person.train(client, 0).code == 0
    assert person.aggregate(0).code == 0
    command = ("evaluate", small_bundle().path, "--weights", person.weights(1), "--engine", "onnxruntime", "--json")
    each = [("--data", tmp_path / f"{client}.npz", "--state", tmp_path / f"state-{client}") for client in range(3)]
    alone = [run(*command, *options).json for options in each]
    found = run(*command, *(option for options in each for option in options)).json
    for one, client in zip(alone, found["clients"], strict=True):
        assert {key: client[key] for key in one.keys() - {"labels"}} == {
            key: one[key] for key in one.keys() - {"labels"}
        }
        assert one["labels"]["y"]["accuracy"] == client["accuracy"]
    accuracies = [one["accuracy"] for one in alone]
    right = sum(one["accuracy"] * one["examples"] for one in alone)
    assert found["accuracy"] == pytest.approx(right / sum(EXAMPLES))
    assert found["distribution"]["of"] == "accuracy"
    assert found["distribution"]["mean"] == pytest.approx(np.mean(accuracies))
    assert found["distribution"]["quartiles"][::4] == [min(accuracies), max(accuracies)]
    text = run(*command[:-1], *(option for options in each for option in options)).out
    assert f"accuracy of 3 clients: mean {np.mean(accuracies):.4f}, " in text
    ended = run(*command, *each[0], *each[1][:2])
    assert (ended.code, "expected a state folder for each of the 2 datasets, or none at all, found 1" in ended.err) == (
        2,
        True,
    )


def test_options_of_the_algorithm_come_from_the_config_as_well(
    run: Command, small_bundle: SmallBundle, tmp_path: Path
) -> None:
    person = Typing(run, small_bundle(), tmp_path)
    config = tmp_path / "config.toml"
    config.write_text('[aggregate]\nalgorithm = "fedavgm:momentum=0.5,lr=0.25"\n')
    assert person.train(0, 0).code == 0
    ended = person.aggregate(0, "--state", tmp_path / "server", config=config)
    assert ended.json["algorithm"] == {"name": "fedavgm", "momentum": 0.5, "lr": 0.25}
    assert ended.json["state"] == str(tmp_path / "server" / "round-1.safetensors")


def test_commands_that_do_not_fit_say_so(run: Command, small_bundle: SmallBundle, tmp_path: Path) -> None:
    person = Typing(run, small_bundle(), tmp_path)
    server = tmp_path / "server"
    for options, code, message in (
        (("--algorithm", "fedavg:mu=0.1"), 2, "algorithm: fedavg: mu: expected an option of it, found an unknown one"),
        (("--algorithm", "fedsgd"), 2, "algorithm: expected one of fedavg, fedprox, scaffold, feddyn"),
        (("--server-state", server), 2, "expected a control variate with algorithm scaffold, found fedavg"),
        (("--algorithm", "scaffold", "--server-state", server), 2, "expected a readable file"),
    ):
        ended = person.train(0, 0, *options)
        assert (ended.code, message in ended.err) == (code, True), ended.err
    assert person.train(0, 0).code == 0
    for options, message in (
        (("--algorithm", "fedavg:momentum=1"), "momentum: expected an option of it, found an unknown one; it has lr"),
        (("--algorithm", "fedadam"), "state: expected a folder for what algorithm fedadam keeps, found none"),
        (
            ("--algorithm", "scaffold", "--state", server),
            "scaffold: clients: expected an integer of at least 1, found none",
        ),
        (("--downlink-codec", "float32"), "--change: expected a file for the published change, found none"),
        (("--change", server), f"--downlink-codec: expected a codec for the change {server}, found none"),
    ):
        ended = person.aggregate(0, *options)
        assert (ended.code, message in ended.err) == (2, True), ended.err
        assert not person.weights(1).exists()
    adam = ("--algorithm", "fedadam", "--state", server)
    assert person.aggregate(0, *adam).code == 0
    files = person.weights(1), server / "round-1.safetensors"
    written = [path.read_bytes() for path in files]
    other = ("--algorithm", "fedadam:lr=0.5", "--state", server)
    for gone in ((), files[:1]):  # none, and then, as a power cut between the two leaves it, the weights
        for path in gone:
            path.unlink()
        ended = person.aggregate(0, *other)
        assert (ended.code, f"{files[1]}: expected a new output, found an existing one" in ended.err) == (7, True)
        assert person.aggregate(0, *adam).code == 0
        assert [path.read_bytes() for path in files] == written
    assert person.train(0, 1).code == 0
    for options, code, message in (
        (("--algorithm", "fedyogi", "--state", server), 2, "algorithm: expected fedadam as in round 1, found fedyogi"),
        (
            ("--algorithm", "fedadam", "--state", tmp_path / "empty"),
            2,
            "algorithm fedadam: expected the server state of round 1, found none",
        ),
        (("--state", server), 2, "algorithm: expected fedadam as in round 1, found fedavg"),
    ):
        ended = person.aggregate(1, *options)
        assert (ended.code, message in ended.err) == (code, True), ended.err
    write_server_state(
        server / "round-1.safetensors", replace(read_server_state(server / "round-1.safetensors"), round=2)
    )
    ended = person.aggregate(1, "--algorithm", "fedadam", "--state", server)
    assert ended.code == 6
    assert "round-1.safetensors: server state: round: expected 1 as the weights have it, found 2" in ended.err
