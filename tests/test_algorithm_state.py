"""What federated optimizers keep from round to round, and that no tensor of one device alone leaves it."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_round
from numpy.typing import NDArray
from small_federation import CONFIG, PAIRS, ROUNDS, Federation, every_engine
from small_net import SHAPE, SmallBundle, small_net, without_verification

from device_runtime.engines.protocol import Engine
from export import export_bundle
from fedpara_edge.aggregation import aggregate
from fedpara_edge.algorithms.adaptive import FedAdam, FedYogi
from fedpara_edge.algorithms.fedavg import FedAvgClient, FedAvgServer
from fedpara_edge.algorithms.fedprox import FedProx
from fedpara_edge.algorithms.scaffold import ScaffoldClient, ScaffoldServer
from fedpara_edge.errors import FedparaError, InputError, WrongBundleError
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.formats.serverstate import ServerState, read_server_state, write_server_state
from fedpara_edge.formats.update import open_update
from fedpara_edge.formats.weights import read_weights, write_weights
from fedpara_edge.storage.rounds import round_path


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
