"""Noise of a device's own: what it sends, that it is sent once, what is refused, and the accounts of both sides."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_round
from command_line import Command
from dp_accounting import GaussianDpEvent
from dp_accounting.pld import PLDAccountant
from failing_disk import PowerCutError
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from signed import RUN
from small_round import LAYOUT, flat, random_tensors, send, start_round, tensor
from softmax_regression import CutShort, SoftmaxRegression, make_bundle, write_npz
from written import plan_with_two_clients, run_here, still

from device_runtime import TrainConfig, open_data, train
from device_runtime.config import TrainCall
from device_runtime.noising import open_noising
from device_runtime.result import TrainResult
from device_runtime.state import DeviceState
from fedpara_edge.aggregation import run_round
from fedpara_edge.aggregation.noised import NoiseGate
from fedpara_edge.algorithms import CLIENT, find_client
from fedpara_edge.algorithms.client import Start
from fedpara_edge.codecs import find_encoder
from fedpara_edge.codecs.decoding import decode_all
from fedpara_edge.errors import BudgetError, InputError, InvalidUpdateError, TooFewUpdatesError
from fedpara_edge.factors.layout import Layout
from fedpara_edge.formats.bundle import open_bundle
from fedpara_edge.formats.update import Update, open_update
from fedpara_edge.formats.weights import Weights, read_weights, write_weights
from fedpara_edge.privacy.devices import DeviceBudget, Sent, open_device_ledger
from fedpara_edge.privacy.local import LocalGaussian, epsilon, find_local
from fedpara_edge.privacy.mechanism import RESOLUTION
from fedpara_edge.trust.envelope import write_envelope
from fedpara_edge.trust.keys import new_key, read_signer

NOISE = find_local("gaussian:clip=0.5,noise=2,epsilon=30,delta=1e-5")
CONFIG = TrainConfig(epochs=2, batch_size=5, lr=0.2, seed=7, save_steps=3)
FLOATS = arrays(np.float32, 40, elements=st.floats(width=32, allow_nan=False, allow_infinity=False))
STATED = {"name": "gaussian", "clip": 0.5, "noise": 2.0}


@given(change=FLOATS, noise=st.floats(1e-3, 1e6), clip=st.floats(1e-6, 1e6))
def test_what_the_noise_hides_is_within_the_clip(change: NDArray[np.float32], noise: float, clip: float) -> None:
    mechanism = LocalGaussian(clip=clip, noise=noise, epsilon=1.0, delta=1e-5)
    steps = mechanism.on_grid(change)
    assert (steps == np.trunc(steps)).all()
    assert math.fsum(step * step for step in steps) * noise**2 <= float(RESOLUTION) ** 2
    if np.linalg.norm(change.astype(np.float64)) <= clip:  # then it is sent as it is
        np.testing.assert_allclose(steps * (clip * noise / RESOLUTION), change, rtol=1e-5, atol=clip * noise * 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.8, 4.0, 30.0])
@pytest.mark.parametrize("rounds", [1, 20])
def test_the_closed_form_is_what_dp_accounting_finds(noise: float, rounds: int) -> None:
    accountant = PLDAccountant()
    accountant.compose(GaussianDpEvent(noise / 2), rounds)  # two changes are up to 2 clips apart
    oracle, found = accountant.get_epsilon(1e-5), epsilon([(noise, 1.0)] * rounds, 1e-5)
    assert found == pytest.approx(oracle, rel=1e-4, abs=1e-4)


@given(st.lists(st.floats(0.05, 1e5), min_size=1, max_size=5), st.floats(1e-12, 0.5))
def test_more_updates_never_cost_less(noises: list[float], delta: float) -> None:
    costs = [epsilon([(noise, 1.0) for noise in noises[:count]], delta) for count in range(len(noises) + 1)]
    assert costs == sorted(costs)
    assert costs[0] == 0
    assert math.isfinite(costs[-1])


class Device:
    """A device with a state folder."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.bundle = open_bundle(folder / "bundle")
        self.data = open_data(folder / "d.npz", self.bundle.manifest)
        self.weights, self.state, self.output = folder / "bundle" / "weights.safetensors", folder / "own", folder / "u"
        self.options: dict[str, Any] = {"privacy": NOISE, **options}

    def train(
        self, config: TrainConfig = CONFIG, engine: SoftmaxRegression | None = None, **options: Any
    ) -> TrainResult:
        given = {"state": self.state, "client": "ann", "overwrite": True, **self.options, **options}
        engine = engine or SoftmaxRegression(self.bundle)
        return train(engine, self.data, self.weights, config, output=self.output, **given)

    def update(self) -> Update:
        update = open_update(self.output, read_weights(self.weights))
        update.close()
        return update

    def change(self) -> NDArray[np.float32]:
        with (update := open_update(self.output, read_weights(self.weights))).file:
            return decode_all(update.decoder, 12)

    def kept(self, group: str) -> NDArray[np.float64]:
        committed = DeviceState(self.state, self.bundle.manifest.fingerprint).committed()
        assert committed is not None
        return flat(committed.after[group])

    def spent(self) -> int:
        path = self.state / "privacy.json"
        return len(json.loads(path.read_text())["spent"]) if path.exists() else 0


@pytest.fixture
def device(tmp_path: Path) -> Device:
    make_bundle(tmp_path / "bundle")
    write_npz(tmp_path / "d.npz")
    return Device(tmp_path)


def test_an_update_states_its_noise_and_nothing_of_the_data(device: Device) -> None:
    result = device.train()
    header = device.update().header
    assert (header.examples, header.steps, dict(header.metrics)) == (1, 1, {})
    assert header.privacy == STATED
    assert result.examples > 1
    assert result.spent == epsilon([(2.0, 1.0)], 1e-5)


def test_noise_is_as_large_as_stated(device: Device) -> None:
    clean, noisy = [], []
    device.train(privacy=None)
    clean = device.change()
    scale = min(1.0, 0.5 / np.linalg.norm(clean))
    for seed in range(40):  # each in a state folder, and so with a secret, of its own
        device.state = device.state.with_name(f"own-{seed}")
        device.train()
        noisy.append(device.change() - scale * clean)
    deviation = np.sqrt(np.mean(np.square(noisy)))
    assert deviation == pytest.approx(1.0, rel=4 / math.sqrt(2 * 40 * 12))
    assert len({tuple(row) for row in noisy}) == 40


@pytest.mark.parametrize("codec", ["float32", "int8", "topk:share=0.3"])
def test_a_call_that_is_done_again_sends_the_same_and_pays_once(device: Device, codec: str) -> None:
    options = {"encoder": find_encoder(codec)}
    device.train(**options)
    sent = device.output.read_bytes()
    device.output.unlink()
    device.train(**options)
    assert device.output.read_bytes() == sent
    assert device.spent() == 1


@pytest.mark.parametrize("after", [0, 4, 7])
def test_a_training_that_was_cut_short_sends_one_update(device: Device, after: int) -> None:
    with pytest.raises(PowerCutError):
        device.train(engine=CutShort(device.bundle, after))
    assert not device.output.exists()
    assert device.spent() == 0
    device.train()
    cut = device.change()
    # Undisturbed, with the same secret, it would have sent the same.
    for name in ("lasting.safetensors", "client"):
        (device.state / name).unlink(missing_ok=True)
    device.train()
    np.testing.assert_array_equal(device.change(), cut)
    assert device.spent() == 1


def test_what_was_paid_for_and_never_written_is_written_by_the_same_call(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as cut:
        cut.setattr("device_runtime.training.encode_update", lambda *_, **__: (_ for _ in ()).throw(PowerCutError))
        with pytest.raises(PowerCutError):
            device.train()
    assert (device.spent(), device.output.exists()) == (1, False)
    device.train()
    assert device.spent() == 1


def test_another_change_has_another_noise_and_is_paid_for(device: Device) -> None:
    device.train()
    first = device.change()
    device.train(replace(CONFIG, lr=0.2000001))
    assert np.linalg.norm(device.change() - first) > 1
    assert device.spent() == 2


def test_nothing_is_sent_beyond_the_budget(device: Device) -> None:
    tight = replace(NOISE, epsilon=epsilon([(2.0, 1.0)], 1e-5) * 1.01)
    device.train(privacy=tight)
    sent = device.output.read_bytes()
    with pytest.raises(BudgetError, match=r"expected at most ε 4\.42.* with round 0 after 1") as found:
        device.train(replace(CONFIG, lr=0.1), privacy=tight)
    assert found.value.exit_code == 8
    assert device.output.read_bytes() == sent
    device.train(privacy=tight)  # what was sent may be sent again
    base = read_weights(device.weights)
    device.weights = device.weights.with_name("w1")
    write_weights(device.weights, replace(base, round=1))
    untouched = SoftmaxRegression(device.bundle)
    with pytest.raises(BudgetError):
        device.train(privacy=tight, engine=untouched)
    assert untouched.steps_taken == 0  # a new round is refused before any work


def test_a_call_that_is_refused_drops_nothing_of_another(device: Device) -> None:
    device.train()
    base = read_weights(device.weights)
    device.weights = device.weights.with_name("w1")
    write_weights(device.weights, replace(base, round=1))
    with pytest.raises(PowerCutError):
        device.train(privacy=None, engine=CutShort(device.bundle, 4))
    saved = (device.state / "progress.safetensors").read_bytes()
    with pytest.raises(BudgetError):
        device.train(privacy=replace(NOISE, epsilon=5.0))
    assert (device.state / "progress.safetensors").read_bytes() == saved


def test_secret_and_spending_are_for_the_device_alone(device: Device) -> None:
    device.train()
    path = device.state / "privacy.json"
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    with pytest.raises(InputError, match="its owner alone can read"):
        device.train()


def test_error_feedback_goes_on_from_the_noisy_change(device: Device) -> None:
    device.train(encoder=find_encoder("topk:share=0.3"))
    sent = device.change()
    residual = device.kept("residual")
    assert np.count_nonzero(sent) < 12
    np.testing.assert_array_equal(residual[sent == 0] != 0, True)
    assert np.linalg.norm(sent + residual) > 1.5  # of a clipped change of 0.5 and noise of 2 · 0.5 · √12


def test_a_device_without_a_state_folder_has_no_secret(device: Device) -> None:
    make_bundle(device.state.with_name("shared"), personal=False)
    device.bundle = open_bundle(device.state.with_name("shared"))
    device.weights = device.bundle.file("weights.safetensors")
    with pytest.raises(InputError, match="privacy: expected a folder for the secret of the noise"):
        device.train(state=None)


@pytest.mark.parametrize("name", CLIENT)
def test_algorithms_whose_updates_state_steps_are_refused(name: str) -> None:
    one, other = (find_client(name).metrics(Start(weights={}, rate_sum=rate)) for rate in (1.0, 2.0))
    states_steps = one != other
    assert states_steps == find_client(name).states_steps
    text = "gaussian:clip=1,noise=2,epsilon=9,delta=1e-5"
    if states_steps:
        with pytest.raises(InputError, match=f"state nothing about the steps with privacy, found {name}") as found:
            TrainCall(algorithm=name, privacy=text)
        assert found.value.key == "algorithm"
    else:
        TrainCall(algorithm=name, privacy=text)


def test_feddyn_keeps_what_was_sent(device: Device) -> None:
    config = replace(CONFIG, algorithm="feddyn:alpha=0.1")
    device.train(config)
    np.testing.assert_allclose(device.kept("dynamic"), -0.1 * device.change(), rtol=1e-5)


def test_models_that_send_running_statistics_are_refused(tmp_path: Path) -> None:
    norm = (tensor("norm.mean", (3,), part="mean"), tensor("norm.variance", (3,), part="variance"))
    weights = start_round(tmp_path, Layout((), (tensor("w", (2,)), *norm)))
    with pytest.raises(InputError, match=r"sends no running statistics .* found 'norm\.mean' and 1 more"):
        open_noising(NOISE, None, None, weights, find_client("fedavg"))


@pytest.mark.parametrize(
    "privacy",
    [
        [], "gaussian", {"name": "laplace", "clip": 1, "noise": 1}, {"name": "gaussian", "clip": 1},
        {**STATED, "noise": 0}, {**STATED, "noise": "2"}, {**STATED, "noise": True}, {**STATED, "clip": 1e31},
        {**STATED, "epsilon": 1},
    ],
)  # fmt: skip
def test_impossible_statements_are_refused(privacy: Any, tmp_path: Path) -> None:
    weights = start_round(tmp_path)
    path = small_round.forge(tmp_path / "u", weights, privacy=privacy)
    with pytest.raises(InvalidUpdateError, match="privacy") as found:
        open_update(path, weights)
    assert found.value.code == "header"


BUDGET = DeviceBudget(epsilon=epsilon([(2.0, 1.0)] * 2, 1e-5) * 1.001, delta=1e-5)


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    return start_round(tmp_path)


def aggregated(folder: Path, *paths: Path, output: str = "next", base: str = "base.safetensors") -> Any:
    with open_device_ledger(folder / "dp") as ledger:
        return run_round(paths, folder / base, folder / output, gate=NoiseGate(BUDGET, ledger)).aggregation


def codes(result: Any) -> dict[str, str]:
    return {each.client: each.code for each in result.rejected}


def test_updates_without_noise_do_not_count(tmp_path: Path, weights: Weights) -> None:
    paths = [send(tmp_path, weights, "ann", privacy=STATED), send(tmp_path, weights, "ben")]
    result = aggregated(tmp_path, *paths)
    assert codes(result) == {"ben": "no_noise"}
    assert [update.client for update in result.accepted] == ["ann"]


def test_a_client_beyond_its_budget_does_not_count_and_the_others_go_on(tmp_path: Path, weights: Weights) -> None:
    for number in range(3):
        base = replace(weights, round=3 + number)
        write_weights(tmp_path / f"base-{number}", base)
        base = read_weights(tmp_path / f"base-{number}")
        noises = {"ann": 2.0, "ben": 30.0}
        paths = [send(tmp_path, base, name, privacy={**STATED, "noise": noise}) for name, noise in noises.items()]
        result = aggregated(tmp_path, *paths, output=f"next-{number}", base=f"base-{number}")
        assert codes(result) == ({"ann": "budget"} if number == 2 else {})
    with pytest.raises(TooFewUpdatesError) as found:
        aggregated(tmp_path, paths[0], output="alone", base="base-2")
    assert "client 'ann': expected at most ε" in str(found.value.rejected[0])


def test_a_round_that_is_done_again_costs_nothing(tmp_path: Path, weights: Weights) -> None:
    path = send(tmp_path, weights, "ann", privacy=STATED)
    for number in range(4):
        aggregated(tmp_path, path, output=f"next-{number}")
    data = json.loads((tmp_path / "dp" / "devices.json").read_text())
    assert data["spent"] == {"ann": [[2.0, 1]]}


def test_a_round_is_accounted_for_before_it_is_written(
    tmp_path: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fedpara_edge.aggregation.round.write_weights", lambda *_, **__: (_ for _ in ()).throw(PowerCutError)
    )
    with pytest.raises(PowerCutError):
        aggregated(tmp_path, send(tmp_path, weights, "ann", privacy=STATED))
    assert json.loads((tmp_path / "dp" / "devices.json").read_text())["spent"] == {"ann": [[2.0, 1]]}


def test_several_updates_of_a_client_are_added_up(tmp_path: Path) -> None:
    with open_device_ledger(tmp_path) as ledger:
        sent = [Sent(client="ann", sha256=str(number) * 64, noise=2.0) for number in range(3)]
        for each in sent:
            ledger.check(BUDGET, each, "b")
        with pytest.raises(BudgetError):
            ledger.record(BUDGET, sent, "b")
        ledger.record(BUDGET, sent[:2], "b")
        ledger.check(BUDGET, sent[0], "b")
        with pytest.raises(BudgetError):
            ledger.check(BUDGET, sent[0], "c")  # as part of another round, it is another one


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.update(version=2),
        lambda data: data["spent"].update(ann=[[2.0, -1]]),
        lambda data: data["spent"].update(ann=[[0.0, 1]]),
        lambda data: data["spent"].update(ann=3),
        lambda data: data["newest"].pop("base"),
        lambda data: data["newest"]["updates"].update(ann="a"),
    ],
)
def test_a_damaged_ledger_is_refused(damage: Any, tmp_path: Path, weights: Weights) -> None:
    aggregated(tmp_path, send(tmp_path, weights, "ann", privacy=STATED))
    path = tmp_path / "dp" / "devices.json"
    data = json.loads(path.read_text())
    damage(data)
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="found a damaged file"), open_device_ledger(tmp_path / "dp"):
        pass


def test_the_commands_spend_and_refuse(tmp_path: Path, weights: Weights, run: Command) -> None:
    lines = [f'run = "{RUN}"', "[clients.ann]", f'key = "{new_key(tmp_path / "ann")}"']
    (tmp_path / "clients.toml").write_text("\n".join(lines))
    path = send(tmp_path, weights, "ann", privacy={**STATED, "noise": 50.0})
    write_envelope(path, path, read_signer(tmp_path / "ann"), RUN)
    eve = send(tmp_path, weights, "ann", name="eve", privacy=STATED, change=random_tensors(LAYOUT, 9))
    files = ("--weights", tmp_path / "base.safetensors", "--state", tmp_path / "state")
    budget = ("--device-privacy", "gaussian:epsilon=1,delta=1e-5")
    trusted = ("--allow", tmp_path / "clients.toml")
    done = run("aggregate", path, eve, *files, "-o", tmp_path / "n", *budget, *trusted, "--json")
    assert done.code == 0, done.err
    assert [each["code"] for each in done.json["rejected"]] == ["unsigned"]  # who spends nothing of ann's budget
    spent = json.loads((tmp_path / "state" / "privacy" / "devices.json").read_text())["spent"]
    assert spent == {"ann": [[50.0, 1]]}
    partial = run("aggregate", path, *files, "-o", tmp_path / "p", "--partial", *budget)
    assert partial.code == 0, partial.err
    refused = run("aggregate", tmp_path / "p", *files, "-o", tmp_path / "q", "--exact", *budget)
    assert refused.code == 4
    assert "found a partial, which states none" in refused.err
    beyond = run("aggregate", eve, *files, "-o", tmp_path / "q", *budget, "--strict")
    assert (beyond.code, beyond.err.count("expected at most ε 1 at δ 1e-05, found")) == (8, 1)
    alone = run("aggregate", path, *files, "-o", tmp_path / "q", "--privacy-ledger", tmp_path / "x")
    assert "expected with --privacy or --device-privacy, found without" in alone.err


def test_a_simulation_rehearses_the_noise_and_is_the_same_each_time(tmp_path: Path) -> None:
    found = []
    for name, privacy in (("one", True), ("other", True), ("plain", False)):
        folder = tmp_path / name
        folder.mkdir()
        with still():
            plan_with_two_clients(folder)
            plan = (folder / "plan.toml").read_text()
            noise = 'privacy = "gaussian:clip=0.1,noise=3,epsilon=9,delta=1e-5"\n'
            (folder / "plan.toml").write_text(
                plan.replace("[aggregate]", noise + "[aggregate]" if privacy else "[aggregate]")
            )
            run_here(folder, "simulate", "plan.toml", "-o", "run")
        found.append((folder / "run" / "metrics.jsonl").read_bytes())
    assert found[0] == found[1] != found[2]
