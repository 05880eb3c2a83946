"""Options of federated optimizers: which are refused, and what a device and a server have to agree on."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_round
from small_federation import CONFIG, PAIRS, Federation
from small_net import SmallBundle

from device_runtime import TrainConfig, open_data, train
from fedpara_edge.aggregation import aggregate
from fedpara_edge.algorithms import ClientAlgorithm, ServerAlgorithm, find_client, find_server
from fedpara_edge.algorithms.fedavg import FedAvgClient
from fedpara_edge.algorithms.feddyn import FedDynClient, FedDynServer
from fedpara_edge.algorithms.fedprox import FedProx
from fedpara_edge.algorithms.scaffold import ScaffoldServer
from fedpara_edge.errors import InputError, TooFewUpdatesError
from fedpara_edge.formats.bundle import WEIGHTS
from fedpara_edge.formats.weights import read_weights


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


def test_more_updates_than_clients_are_refused(tmp_path: Path) -> None:
    weights = small_round.start_round(tmp_path, number=0)
    metrics = {"learning_rate_sum": 0.5}
    paths = [small_round.send(tmp_path, weights, client, metrics=metrics) for client in "abc"]
    with pytest.raises(InputError, match="clients: expected at least as many as the 3 that take part, found 2; give"):
        aggregate(paths, weights, algorithm=ScaffoldServer(clients=2))
