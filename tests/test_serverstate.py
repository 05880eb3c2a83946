"""The server state file: what is put in comes out, belongs to one round, and hostile files are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_round
from failing_disk import full_disk
from golden import DIGEST, content_of
from safetensors.numpy import load_file, save_file

from fedpara_edge.algorithms.adaptive import FedAdam
from fedpara_edge.algorithms.fedavg import FedAvgServer
from fedpara_edge.algorithms.fedavgm import FedAvgM
from fedpara_edge.algorithms.feddyn import FedDynServer
from fedpara_edge.algorithms.scaffold import ScaffoldServer
from fedpara_edge.errors import FedparaError, InputError, WrongBundleError
from fedpara_edge.factors.layout import Layout
from fedpara_edge.formats.serverstate import (
    RESIDUAL,
    ServerState,
    read_server_state,
    read_state_for,
    state_of,
    write_server_state,
)
from fedpara_edge.formats.weights import Weights
from fedpara_edge.storage.rounds import round_path

GOLDEN = (
    rb'{"__metadata__":{"fedpara_edge":"{\"algorithm\":{\"name\":\"fedavgm\",\"options\":{\"lr\":1.0,'
    rb"\"momentum\":0.9}},\"base\":\"00\","
    rb"\"digest\":\"e01899a021f0264877c854a2227ff1a21f38e86775832d3e0dcc54129d884a6a\","
    rb"\"fingerprint\":\"ff\",\"format\":\"fedpara-edge/server-state\","
    rb'\"round\":3,\"version\":1}"},'
    rb'"momentum/a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
)


def make_state(weights: Weights, *, residual: bool = True) -> ServerState:
    groups = {group: small_round.random_tensors(weights.layout, seed) for seed, group in enumerate(FedAdam().groups)}
    return state_of(weights, FedAdam(), {**groups, **({RESIDUAL: groups["moment1"]} if residual else {})})


def test_golden_bytes_with_a_digest_and_without_as_up_to_0_2(tmp_path: Path) -> None:
    path = tmp_path / "state"
    groups = {"momentum": {"a": np.array([1, -2], np.float32)}}
    algorithm = FedAvgM()
    state = ServerState(
        fingerprint="ff", round=3, base="00", algorithm=algorithm.name, options=algorithm.options(), groups=groups
    )
    write_server_state(path, state)
    assert path.read_bytes() == content_of(GOLDEN)
    written = read_server_state(path)
    path.write_bytes(content_of(re.sub(DIGEST, b"", GOLDEN)))
    assert repr(read_server_state(path)) == repr(written)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    weights = small_round.start_round(tmp_path)
    state = make_state(weights)
    path = round_path(tmp_path, weights.round)
    write_server_state(path, state)
    found = read_server_state(path)
    assert replace(found, groups={}) == replace(state, groups={})
    assert found.groups.keys() == {"moment1", "moment2", RESIDUAL}
    for group, tensors in state.groups.items():
        assert found.groups[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(found.groups[group][name], tensor, strict=True)
    assert read_server_state(path, only=(RESIDUAL,)).groups.keys() == {RESIDUAL}
    assert len(load_file(path)) == 3 * len(weights.tensors)
    read = read_state_for(tmp_path, weights)
    assert read is not None
    read.check_algorithm(FedAdam())


def test_nothing_to_keep_is_kept_too(tmp_path: Path) -> None:
    weights = small_round.start_round(tmp_path)
    write_server_state(round_path(tmp_path, 3), state_of(weights, FedAvgServer(), {}))
    found = read_state_for(tmp_path, weights)
    assert found is not None
    assert found.groups == {}
    found.check_algorithm(FedAvgServer(lr=0.5))


def test_once_begun_the_folder_has_a_file_for_every_round(tmp_path: Path) -> None:
    first = small_round.start_round(tmp_path, number=0)
    assert read_state_for(tmp_path / "none", first) is None
    later = small_round.start_round(tmp_path)
    assert read_state_for(tmp_path, later) is None
    assert read_state_for(tmp_path, replace(later, round=1 << 40)) is None  # at once, however many rounds there were
    for name in ("round-x.safetensors", "round-01.safetensors", "round-4.safetensors"):
        (tmp_path / name).touch()
    assert read_state_for(tmp_path, later) is None
    round_path(tmp_path, 5).touch()
    with pytest.raises(InputError, match=r"of round 3, found those from round 4 to 5: older ones were removed; go on"):
        read_state_for(tmp_path, later)
    assert read_state_for(tmp_path, first) is None
    write_server_state(round_path(tmp_path, 2), make_state(first))
    with pytest.raises(
        InputError, match=r"round-3.safetensors: expected the server state of round 3, found that of round 2; aggr"
    ):
        read_state_for(tmp_path, later)
    write_server_state(round_path(tmp_path, 3), make_state(first))
    with pytest.raises(WrongBundleError, match=r"round-3.safetensors: server state: round: expected 3 as the weights"):
        read_state_for(tmp_path, later)


MISFITS: dict[str, tuple[Callable[[ServerState], ServerState], str]] = {
    "bundle": (
        lambda state: replace(state, fingerprint="0" * 64),
        "fingerprint: expected f+… as the weights have it, found 000000000000…",
    ),
    "round": (lambda state: replace(state, round=4), "round: expected 3 as the weights have it, found 4; take the"),
    "base": (
        lambda state: replace(state, base="1" * 64),
        "base: expected .*… as the weights have it, found 111111111111…",
    ),
    "missing tensor": (
        lambda state: replace(state, groups={"moment1": {}}),
        r"tensor 'moment1/conv.bias': expected shape \(4,\), found None",
    ),
    "extra tensor": (
        lambda state: replace(state, groups={"h": {**state.groups["moment1"], "a": np.zeros(2, np.float32)}}),
        r"tensor 'h/a': expected shape None, found \(2,\)",
    ),
    "shape": (
        lambda state: replace(state, groups={"h": {**state.groups["moment1"], "fc.x1": np.zeros(2, np.float32)}}),
        r"tensor 'h/fc.x1': expected shape \(6, 2\), found \(2,\)",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_state_of_other_weights_is_refused(case: str, tmp_path: Path) -> None:
    weights = small_round.start_round(tmp_path)
    change, message = MISFITS[case]
    make_state(weights).check_weights(weights)
    with pytest.raises(WrongBundleError, match=f"server state: {message}"):
        change(make_state(weights)).check_weights(weights)


def test_groups_must_be_those_of_the_algorithm(tmp_path: Path) -> None:
    state = make_state(small_round.start_round(tmp_path))
    state.check_algorithm(FedAdam())
    for groups in ({}, {"moment1": state.groups["moment1"]}, {**state.groups, "h": state.groups["moment1"]}):
        with pytest.raises(WrongBundleError, match="expected the groups moment1, moment2 of fedadam, found "):
            replace(state, groups=groups).check_algorithm(FedAdam())


def test_options_that_give_what_is_kept_its_meaning_stay(tmp_path: Path) -> None:
    weights = small_round.start_round(tmp_path)
    kept = {"h": weights.tensors}
    state = state_of(weights, FedDynServer(clients=10, alpha=0.1), kept)
    state.check_algorithm(FedDynServer(clients=10, alpha=0.1))
    for other, message in (
        (
            FedDynServer(clients=12, alpha=0.1),
            "clients: expected 10 as in round 3, found 12; go on as in the rounds before",
        ),
        (FedDynServer(clients=10, alpha=0.2), "alpha: expected 0.1 as in round 3, found 0.2"),
        (ScaffoldServer(clients=10), "algorithm: expected feddyn as in round 3, found scaffold"),
    ):
        with pytest.raises(InputError, match=message):
            state.check_algorithm(other)
    state_of(weights, ScaffoldServer(clients=10, lr=1.0), {"control": weights.tensors}).check_algorithm(
        ScaffoldServer(clients=10, lr=0.5)
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_state_that_is_not_finite_is_neither_written_nor_read(value: float, tmp_path: Path) -> None:
    weights = small_round.start_round(tmp_path)
    path, state = tmp_path / "state", make_state(weights)
    write_server_state(path, state)
    before = path.read_bytes()
    broken = {**state.groups["moment2"], "fc.x1": np.full((6, 2), value, np.float32)}
    with pytest.raises(FedparaError, match=r"tensor 'moment2/fc.x1': expected a finite state"):
        write_server_state(path, replace(state, groups={**state.groups, "moment2": broken}))
    assert path.read_bytes() == before
    rewrite(path, tensors={f"moment2/{name}": tensor for name, tensor in broken.items()})
    with pytest.raises(WrongBundleError, match=r"tensor 'moment2/fc.x1': expected a finite state, found NaN or Inf"):
        read_server_state(path)


def rewrite(path: Path, *, tensors: dict[str, Any] | None = None, **changed: Any) -> None:
    """Change header fields (None removes one) or tensors of a file."""
    state = read_server_state(path)
    header = {
        "format": "fedpara-edge/server-state",
        "version": 1,
        "fingerprint": state.fingerprint,
        "round": state.round,
        "base": state.base,
        "algorithm": {"name": state.algorithm, "options": dict(state.options)},
        **changed,
    }
    text = json.dumps({name: value for name, value in header.items() if value is not None})
    save_file(load_file(path) if tensors is None else tensors, path, metadata={"fedpara_edge": text})


HOSTILE_HEADERS: dict[str, dict[str, Any]] = {
    "format": {"format": "fedpara-edge/weights"},
    "version": {"version": 2},
    "fingerprint": {"fingerprint": None},
    "base": {"base": 5},
    "round": {"round": -1},
    "round ": {"round": True},
    "round  ": {"round": 1.0},
    "algorithm": {"algorithm": "fedadam"},
    "algorithm ": {"algorithm": {"name": "fedadam"}},
    "algorithm  ": {"algorithm": {"name": ["fedadam"], "options": {}}},
    "algorithm   ": {"algorithm": {"name": "fedsgd", "options": {}}},
    "algorithm    ": {"algorithm": {"name": "fedadam", "options": [1]}},
}


@pytest.mark.parametrize("case", HOSTILE_HEADERS)
def test_hostile_headers_are_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_server_state(path, make_state(small_round.start_round(tmp_path)))
    rewrite(path, **HOSTILE_HEADERS[case])
    expected = {"format": "expected fedpara-edge/server-state", "version": "version 1, found version 2"}
    stated = expected.get(case, f"{case.strip()}: expected that of a server state, found ")
    with pytest.raises(WrongBundleError, match=stated) as caught:
        read_server_state(path)
    assert str(caught.value).startswith(f"{path}: ")


ONE = np.ones(2, np.float32)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("h/a", ONE),
        ("moment1", ONE),
        ("moment1/", ONE),
        ("../a", ONE),
        ("/a", ONE),
        ("moment1/a", ONE.astype(np.float64)),
        ("residual/a", ONE.astype(np.int8)),
    ],
)
def test_tensors_of_other_groups_or_dtypes_are_refused(name: str, tensor: Any, tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_server_state(path, make_state(small_round.start_round(tmp_path)))
    rewrite(path, tensors={name: tensor})
    with pytest.raises(WrongBundleError, match="expected float32 in a group of moment1, moment2, residual, found") as c:
        read_server_state(path)
    assert str(c.value).startswith(f"{path}: tensor {name!r}: ")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_server_state(path, make_state(small_round.start_round(tmp_path)))
    whole = path.read_bytes()
    for content, found in {
        b"": "expected a whole safetensors file, found an empty file",
        whole[:7]: "expected a whole safetensors file",
        whole[:-1]: "expected a whole safetensors file",
        whole + b"0": "expected a whole safetensors file",
        b"x" * 100: "expected fedpara-edge/server-state, found",
    }.items():
        path.write_bytes(content)
        with pytest.raises(WrongBundleError, match=found):
            read_server_state(path)
    for wrong, error in ((tmp_path, WrongBundleError), (tmp_path / "none", InputError)):
        with pytest.raises(error, match="expected a readable file"):
            read_server_state(wrong)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "state"
    weights = Weights("ff", 0, Layout((), (small_round.tensor("a", (2,)),)), {"a": np.ones(2, np.float32)})
    write_server_state(path, state_of(weights, FedAvgM(), {"momentum": weights.tensors}))
    before = path.read_bytes()
    with full_disk(), pytest.raises(FedparaError, match="No space left on device"):
        write_server_state(path, state_of(weights, FedAvgM(momentum=0.5), {"momentum": weights.tensors}))
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["state"]
