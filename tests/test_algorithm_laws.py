"""What every algorithm owes, whoever registers it: the laws run over the registries, and a sloppy one breaks them."""

import json
import math
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import small_round
from numpy.typing import NDArray

from fedpara_edge.aggregation import aggregate
from fedpara_edge.algorithms import CLIENT, SERVER, find_client, find_server
from fedpara_edge.algorithms.algorithm import Algorithm
from fedpara_edge.algorithms.client import ClientAlgorithm, Start
from fedpara_edge.algorithms.fedavg import FedAvgClient, FedAvgServer
from fedpara_edge.algorithms.fedavgm import FedAvgM
from fedpara_edge.algorithms.fedprox import FedProx
from fedpara_edge.algorithms.scaffold import ScaffoldClient, ScaffoldServer
from fedpara_edge.algorithms.server import ServerAlgorithm, Vector
from fedpara_edge.errors import DivergedError, InputError, InvalidUpdateError
from fedpara_edge.formats.serverstate import RESIDUAL, read_server_state, state_of, write_server_state
from fedpara_edge.formats.weights import read_weights, write_weights
from fedpara_edge.options import declared, typed

ENTRIES, CLIENTS = 90, 4
REQUIRED = {"clients": CLIENTS}
"""Values for options without a default."""
SHAPES = {"a": (5, 3), "b": (7,), "c": ()}
RESERVED = {"personal", "engine", RESIDUAL}
"""Groups of state folders that are nobody's algorithm's."""
NO_NUMBER = (math.nan, math.inf, -math.inf, "1", True)


def variants(kind: type[Algorithm]) -> Iterator[Any]:
    """The algorithm as it is unless told otherwise, and with each option halved where that is allowed."""
    required = {field.name: REQUIRED[field.name] for field in fields(kind) if field.default is MISSING}
    plain = kind(**required)
    yield plain
    for option, value in plain.options().items():
        if isinstance(value, float):
            yield replace(plain, **{option: value / 2})


def check_options(found: Algorithm, known: Mapping[str, type[Algorithm]], find: Any) -> None:
    """Laws of both halves."""
    assert known[found.name] is type(found)
    assert find(typed(found.name, found)) == found
    assert declared(type(found)).keys() == found.options().keys()
    assert json.loads(json.dumps(found.to_json(), allow_nan=False)) == {"name": found.name, **found.options()}
    for option in found.options():
        for value in NO_NUMBER:
            with pytest.raises(InputError) as refused:
                replace(found, **{option: value})
            assert refused.value.key == option
            if not isinstance(value, bool | str):
                with pytest.raises(InputError, match=f"^algorithm: {found.name}: {option}: expected"):
                    find(f"{found.name}:{option}={value}")
    with pytest.raises(InputError, match="of_nobody: expected an option of it, found an unknown one"):
        find(f"{found.name}:of_nobody=1")


def tensors(seed: int) -> dict[str, NDArray[np.float32]]:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def zeros() -> dict[str, NDArray[np.float32]]:
    return {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}


def check_tensors(found: Mapping[str, Any]) -> None:
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} == {
        name: (shape, np.float32) for name, shape in SHAPES.items()
    }
    assert all(np.isfinite(tensor).all() for tensor in found.values())


def check_equal(found: Mapping[str, Any] | None, expected: Mapping[str, Any] | None) -> None:
    for name in SHAPES:
        np.testing.assert_array_equal(*((0.0 if of is None else of[name]) for of in (found, expected)))


def check_client(name: str) -> None:
    """The laws of the client algorithm of that name."""
    for algorithm in variants(CLIENT[name]):
        check_options(algorithm, CLIENT, find_client)
        assert algorithm.group not in RESERVED
        assert "/" not in (algorithm.group or "")
        algorithm.check_optimizer({"name": "sgd"})
        server = SERVER[name] if algorithm.paired or algorithm.controlled else None
        assert not algorithm.controlled or "control" in getattr(server, "groups", ())
        kept = tensors(1) if algorithm.group else {}
        control = tensors(2) if algorithm.controlled else {}
        start = Start(weights=tensors(0), kept=kept, control=control, rate_sum=0.7)
        given = [{name: tensor.copy() for name, tensor in of.items()} for of in (start.weights, kept, control)]
        sent = tensors(3)

        term, keeps = algorithm.term(start), algorithm.keep(start, sent)
        assert math.isfinite(term.mu)
        if term.h is not None:
            check_tensors(term.h)
        assert bool(keeps) == (algorithm.group is not None)
        if keeps:
            check_tensors(keeps)
        for before, after in zip(given, (start.weights, kept, control), strict=True):
            for tensor, values in before.items():
                np.testing.assert_array_equal(after[tensor], values)

        # Before the first round everything that is kept is zero.
        first = Start(weights=start.weights, rate_sum=0.7)
        explicit = replace(first, kept={**zeros()} if kept else {}, control={**zeros()} if control else {})
        assert algorithm.term(first).mu == algorithm.term(explicit).mu
        check_equal(algorithm.term(first).h, algorithm.term(explicit).h)
        if keeps:
            check_equal(algorithm.keep(first, sent), algorithm.keep(explicit, sent))

        metrics = algorithm.metrics(start)
        assert all(type(value) is float and math.isfinite(value) for value in metrics.values())
        if name in SERVER:
            partner = next(variants(SERVER[name]))
            shared = {key: value for key, value in algorithm.options().items() if key in partner.options()}
            replace(partner, **shared).check_metrics(metrics)
        try:
            huge = algorithm.keep(replace(start, rate_sum=1e-30), {n: np.full_like(t, 3e38) for n, t in sent.items()})
        except DivergedError:
            continue
        assert all(np.isfinite(tensor).all() for tensor in huge.values())


def metrics_for(algorithm: ServerAlgorithm, rate_sum: float = 0.7) -> dict[str, float]:
    """The metrics of an update of its own clients."""
    if algorithm.name not in CLIENT:
        return {}
    kind = CLIENT[algorithm.name]
    options = {field.name: algorithm.options()[field.name] for field in fields(kind)}
    return kind(**options).metrics(Start(weights={}, rate_sum=rate_sum))


def check_server(name: str) -> None:
    """The laws of the server algorithm of that name, as far as they need no files."""
    for algorithm in variants(SERVER[name]):
        check_options(algorithm, SERVER, find_server)
        assert len({*algorithm.groups, *RESERVED}) == len(algorithm.groups) + len(RESERVED)
        assert not any("/" in group for group in algorithm.groups)
        assert algorithm.weighting in ("examples", "equal")
        check_participation(algorithm)
        check_server_metrics(algorithm)
        check_step(algorithm)
        check_large_changes(algorithm)


def check_participation(algorithm: ServerAlgorithm) -> None:
    shares = [algorithm.participation(updates) for updates in range(1, CLIENTS + 1)]
    assert all(0 < share <= 1 for share in shares)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    if "clients" in algorithm.options():
        with pytest.raises(InputError) as refused:
            algorithm.participation(CLIENTS + 1)
        assert refused.value.key == "clients"


def check_server_metrics(algorithm: ServerAlgorithm) -> None:
    own = metrics_for(algorithm)
    algorithm.check_metrics(own)
    assert algorithm.largest_change(own) > 0
    if algorithm.name in CLIENT and CLIENT[algorithm.name].paired:
        with pytest.raises(InvalidUpdateError) as refused:
            algorithm.check_metrics({})
        assert refused.value.code == "wrong_algorithm"


def check_step(algorithm: ServerAlgorithm) -> None:
    random = np.random.default_rng(0)
    weights = np.array([0.5, 0.2, 0.3])
    shares = algorithm.shares(weights, [metrics_for(algorithm, rate) for rate in (0.5, 0.7, 1.1)])
    assert shares.shape == (len(shares), 3)
    np.testing.assert_array_equal(shares[0], weights)
    kept = {group: np.full(ENTRIES, algorithm.start(group)) for group in algorithm.groups}
    still = algorithm.step(np.zeros((len(shares), ENTRIES)), kept, 0.75)[0]
    np.testing.assert_array_equal(still, np.zeros(ENTRIES), "nobody moved, so nothing moves")
    for _ in range(3):
        means = shares @ random.standard_normal((3, ENTRIES))
        given = {"means": means.copy(), **{group: values.copy() for group, values in kept.items()}}
        moved, keeps = algorithm.step(means, kept, 0.75)
        assert keeps.keys() == set(algorithm.groups)
        for values in (moved, *keeps.values()):
            assert (values.shape, values.dtype) == ((ENTRIES,), np.float64)
            assert np.isfinite(values).all()
        for name, values in {"means": means, **kept}.items():
            np.testing.assert_array_equal(values, given[name], "an argument was changed")
        order = random.permutation(ENTRIES)[: ENTRIES // 2]
        part, kept_part = algorithm.step(means[:, order], {group: kept[group][order] for group in kept}, 0.75)
        np.testing.assert_array_equal(part, moved[order], "a part of the model moves otherwise than in the whole")
        for group, values in kept_part.items():
            np.testing.assert_array_equal(values, keeps[group][order])
        if algorithm.convex:
            assert (moved * means[0] >= 0).all()
            assert (np.abs(moved) <= np.abs(means[0])).all()
        kept = keeps


def check_large_changes(algorithm: ServerAlgorithm) -> None:
    """What is no larger than `largest_change` leaves the groups in float32."""
    own = metrics_for(algorithm)
    largest = min(algorithm.largest_change(own), float(np.finfo(np.float32).max)) * 0.99
    shares = algorithm.shares(np.ones(1), [own])
    kept = {group: np.full(2, algorithm.start(group)) for group in algorithm.groups}
    for values in algorithm.step(shares @ np.array([[largest, -largest]]), kept, 1.0)[1].values():
        with np.errstate(over="ignore"):
            assert np.isfinite(values.astype(np.float32)).all()


@pytest.mark.parametrize("name", CLIENT)
def test_laws_of_clients(name: str) -> None:
    check_client(name)


@pytest.mark.parametrize("name", SERVER)
def test_laws_of_servers(name: str) -> None:
    check_server(name)


@pytest.mark.parametrize("name", SERVER)
def test_equal_updates_of_all_clients_give_finite_weights_round_after_round(name: str, tmp_path: Path) -> None:
    algorithm = next(variants(SERVER[name]))
    weights, state = small_round.start_round(tmp_path, number=0), None
    shapes = {tensor.name: tensor.shape for tensor in weights.layout.shared}
    for number in range(3):
        change = small_round.random_tensors(weights.layout, number, 0.1)
        paths = [
            small_round.send(tmp_path, weights, client, change=change, metrics=metrics_for(algorithm))
            for client in "abcd"[:CLIENTS]
        ]
        if number == 0:
            starts = {
                group: {name: np.full(shape, algorithm.start(group), np.float32) for name, shape in shapes.items()}
                for group in algorithm.groups
            }
            explicit = aggregate(paths, weights, algorithm=algorithm, state=state_of(weights, algorithm, starts))
            assert explicit.weights.base == aggregate(paths, weights, algorithm=algorithm).weights.base
        result = aggregate(paths, weights, algorithm=algorithm, state=state)
        assert aggregate(paths[::-1], weights, algorithm=algorithm, state=state).weights.base == result.weights.base
        assert (result.state is None) == (not algorithm.groups)
        write_weights(tmp_path / "next", result.weights)
        weights = read_weights(tmp_path / "next")
        if result.state is not None:
            write_server_state(tmp_path / "state", result.state)
            state = read_server_state(tmp_path / "state")
            state.check_algorithm(algorithm)
            for group in algorithm.groups:
                assert {name: tensor.shape for name, tensor in state.groups[group].items()} == shapes


@dataclass(frozen=True, kw_only=True)
class UncheckedOption(FedProx):
    name = "sloppy"

    def __post_init__(self) -> None:
        pass


class ModelSizedTerm(FedProx):
    name = "sloppy"

    def term(self, start: Start) -> Any:
        found = super().term(start)
        return replace(found, h={name: tensor.reshape(-1) for name, tensor in (found.h or {}).items()})


class KeepsWithoutSaying(FedAvgClient):
    name = "sloppy"

    def keep(self, start: Start, sent: Any) -> Any:  # noqa: ARG002
        return dict(sent)


class StartsElsewhere(FedAvgClient):
    name = "sloppy"
    group = "dynamic"

    def keep(self, start: Start, sent: Any) -> Any:
        return {name: (start.kept[name] if start.kept else np.float32(1)) + change for name, change in sent.items()}


class Infinite(FedAvgClient):
    name = "sloppy"
    group = "dynamic"

    def keep(self, start: Start, sent: Any) -> Any:
        with np.errstate(over="ignore"):
            return {name: change / np.float32(start.rate_sum) for name, change in sent.items()}


class OthersName(FedAvgClient):
    name = "fedprox"


class TakesTheResidual(FedAvgM):
    name = "sloppy"
    groups = (RESIDUAL,)


class Normalized(FedAvgServer):
    name = "sloppy"

    def step(self, means: Vector, kept: Any, participation: float) -> Any:  # noqa: ARG002
        return means[0] / (np.linalg.norm(means[0]) or 1.0), {}


class InPlace(FedAvgServer):
    name = "sloppy"

    def step(self, means: Vector, kept: Any, participation: float) -> Any:  # noqa: ARG002
        means[0] *= self.lr / 2
        return means[0].copy(), {}


class ForgetsItsGroup(FedAvgM):
    name = "sloppy"

    def step(self, means: Vector, kept: Any, participation: float) -> Any:
        return super().step(means, kept, participation)[0], {}


class Drifts(FedAvgServer):
    name = "sloppy"

    def step(self, means: Vector, kept: Any, participation: float) -> Any:  # noqa: ARG002
        return means[0] + 1e-9, {}


class Squares(FedAvgM):
    name = "sloppy"

    def step(self, means: Vector, kept: Any, participation: float) -> Any:  # noqa: ARG002
        return means[0], {"momentum": means[0] ** 3}


class CountsAnybody(ScaffoldServer):
    name = "sloppy"

    def participation(self, updates: int) -> float:
        return updates / self.clients


SLOPPY: dict[type[Any], str] = {
    UncheckedOption: "with pytest.raises(InputError)",
    ModelSizedTerm: "(tensor.shape, tensor.dtype)",
    KeepsWithoutSaying: "algorithm.group is not None",
    StartsElsewhere: "0.0 if of is None else of[name]",
    Infinite: "for tensor in huge.values()",
    OthersName: "known[found.name] is type(found)",
    TakesTheResidual: "len(RESERVED)",
    Normalized: "a part of the model moves otherwise",
    InPlace: "an argument was changed",
    ForgetsItsGroup: "keeps.keys() == set(algorithm.groups)",
    Drifts: "nobody moved",
    Squares: "values.astype(np.float32)",
    CountsAnybody: "with pytest.raises(InputError)",
}
"""Algorithms that each break one law, and a part of the line that says so."""


@pytest.mark.parametrize("kind", SLOPPY, ids=lambda kind: kind.__name__)
def test_a_sloppy_algorithm_breaks_its_law(kind: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    clients, servers = (cast(MutableMapping[str, Any], registry) for registry in (CLIENT, SERVER))
    is_client = issubclass(kind, ClientAlgorithm)
    monkeypatch.setitem(clients if is_client else servers, "sloppy", kind)
    if kind is CountsAnybody:
        monkeypatch.setitem(clients, "sloppy", ScaffoldClient)
    with pytest.raises((AssertionError, pytest.fail.Exception)) as broken:
        (check_client if is_client else check_server)("sloppy")
    lines = [str(entry.statement) for entry in broken.traceback if Path(entry.path) == Path(__file__)]
    assert SLOPPY[kind] in lines[-1]
