"""Evaluation on many devices: each with its own personal tensors, and how the results are distributed."""

from pathlib import Path

import numpy as np
import pytest
from kept import commit
from softmax_regression import SoftmaxRegression, make_bundle, write_npz

from device_runtime import evaluate, load_weights, open_data
from device_runtime.clients import Client, Distribution, distribution, evaluate_clients, pair_clients
from device_runtime.evaluation import overall
from device_runtime.state import open_state
from device_runtime.statefiles import Committed
from fedpara_edge.errors import InputError
from fedpara_edge.formats.bundle import WEIGHTS, Bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


def make_client(folder: Path, bundle: Bundle, name: str, *, bias: list[float] | None = None) -> Client:
    data = write_npz(folder / f"{name}.npz", examples=10 + ord(name), seed=ord(name))
    state = folder / name
    with open_state(state, bundle.manifest.fingerprint) as kept:
        if bias is not None:
            personal = {"personal": {"fc.bias": np.array(bias, np.float32)}}
            commit(kept, Committed(call={"round": 0, "base": ""}, before=personal, after=personal))
    return Client(data=data, state=state)


def test_each_client_is_evaluated_with_its_own_tensors_whatever_the_order(tmp_path: Path, bundle: Bundle) -> None:
    clients = [
        make_client(tmp_path, bundle, "a", bias=[3, 0, 0]),
        make_client(tmp_path, bundle, "b"),
        make_client(tmp_path, bundle, "c", bias=[0, 0, 9]),
    ]
    weights = bundle.file(WEIGHTS)
    alone = []
    for client in clients:
        engine = SoftmaxRegression(bundle)
        load_weights(engine, weights, state=client.state)
        alone.append(evaluate(engine, open_data(client.data, bundle.manifest), 7))
    assert evaluate_clients(SoftmaxRegression(bundle), weights, clients, 7) == alone
    assert evaluate_clients(SoftmaxRegression(bundle), weights, clients[::-1], 7) == alone[::-1]
    without = [Client(data=client.data) for client in clients]
    assert evaluate_clients(SoftmaxRegression(bundle), weights, without, 7)[1] == alone[1]
    assert evaluate_clients(SoftmaxRegression(bundle), weights, without, 7)[0] != alone[0]


def test_together_is_the_evaluation_on_all_examples(tmp_path: Path, bundle: Bundle) -> None:
    clients = [Client(data=make_client(tmp_path, bundle, name).data) for name in "abc"]
    found = evaluate_clients(SoftmaxRegression(bundle), bundle.file(WEIGHTS), clients, 7)
    parts = [np.load(client.data) for client in clients]
    np.savez(tmp_path / "all.npz", **{name: np.concatenate([part[name] for part in parts]) for name in ("x", "y")})
    whole = evaluate(SoftmaxRegression(bundle), open_data(tmp_path / "all.npz", bundle.manifest), 7)
    together = overall(found)
    assert together.examples == whole.examples == sum(each.examples for each in found)
    assert together.loss == pytest.approx(whole.loss, rel=1e-6)
    assert together.accuracy == pytest.approx(whole.accuracy)
    assert overall(found[:1]) == found[0]


def test_folders_come_in_pairs_with_data() -> None:
    data, states = [Path("a.npz"), Path("b.npz")], [Path("a"), Path("b")]
    assert pair_clients(data, states)[1] == Client(data=Path("b.npz"), state=Path("b"))
    assert [client.state for client in pair_clients(data, ())] == [None, None]
    with pytest.raises(
        InputError, match="state: expected a state folder for each of the 2 datasets, or none at all, found 1"
    ):
        pair_clients(data, states[:1])


def test_the_distribution_counts_all_clients_alike() -> None:
    assert distribution([0.4]) == Distribution(mean=0.4, deviation=0.0, quartiles=(0.4,) * 5)
    found = distribution([0.0, 0.25, 0.5, 0.75, 1.0])
    assert found.quartiles == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert found.mean == 0.5
    assert found.deviation == pytest.approx(np.sqrt(0.125))
