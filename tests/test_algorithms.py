"""Federated optimizers: each is what its paper says, in both engines, through the files of a round."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import small_round
import torch
from norms import relative_error
from small_federation import CONFIG, EXAMPLES, PAIRS, ROUNDS, Federation, every_engine, write_data
from small_net import CLASSES, SHAPE, SmallBundle, small_net
from torch.nn import functional as F

from device_runtime import Adjustment, open_data, open_engine
from device_runtime.batches import epoch_batches
from device_runtime.epochs import count_steps
from device_runtime.schedule import learning_rate_at
from fedpara_edge.aggregation import AggregateConfig, aggregate, run_round
from fedpara_edge.algorithms import ClientAlgorithm, ServerAlgorithm
from fedpara_edge.algorithms.adaptive import FedAdagrad, FedAdam, FedYogi
from fedpara_edge.algorithms.fedavg import FedAvgClient, FedAvgServer
from fedpara_edge.algorithms.fedavgm import FedAvgM
from fedpara_edge.algorithms.feddyn import FedDynClient, FedDynServer
from fedpara_edge.algorithms.fedprox import FedProx
from fedpara_edge.algorithms.scaffold import ScaffoldClient, ScaffoldServer
from fedpara_edge.errors import InputError, WrongBundleError
from fedpara_edge.formats.bundle import WEIGHTS, Bundle, open_bundle
from fedpara_edge.formats.serverstate import read_server_state
from fedpara_edge.formats.update import open_update
from fedpara_edge.formats.weights import read_weights
from fedpara_edge.options import typed
from fedpara_edge.storage.rounds import round_path

TOLERANCE = 1e-5


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
