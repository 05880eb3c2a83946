"""Differential privacy: the most that a client does to the noisy mean, the noise, the ledger, and what conflicts."""

from __future__ import annotations

import json
import math
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Command
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from small_round import LAYOUT, flat, random_tensors, send, start_round, tensor

from fedpara_edge.aggregation import AggregateConfig, Round, run_round
from fedpara_edge.errors import BudgetError, FedparaError, InputError, OutputExistsError, TooFewUpdatesError
from fedpara_edge.factors.layout import Layout
from fedpara_edge.formats.transcript import read_transcript
from fedpara_edge.formats.weights import Weights, read_weights
from fedpara_edge.privacy.accounting import epsilon
from fedpara_edge.privacy.ledger import open_privacy_ledger
from fedpara_edge.privacy.mechanism import RESOLUTION, Gaussian, clipped, clipped_sum, find_mechanism
from fedpara_edge.privacy.noise import gaussian_integers
from fedpara_edge.simulation.folder import JobFolder
from fedpara_edge.simulation.tasks.aggregate import aggregate_round
from fedpara_edge.trust.audit import audit

GAUSSIAN = "gaussian:clip=0.5,noise=1.5,expected=4,epsilon=20,delta=1e-5"
CLIENTS = ("ann", "ben", "cid", "dan")


def cheap(rounds: Any, delta: float) -> float:  # noqa: ARG001
    """An ε of one a round."""
    return float(len(rounds))


class Silent:
    """A budget whose noise is always the same, so that rounds differ by their sums alone."""

    def spend(self, mechanism: Any, content: bytes, round: int, *, again: bool) -> bytes:  # noqa: ARG002
        return b"the same"


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    return start_round(tmp_path)


def aggregated(
    folder: Path, *paths: Path, budget: Any, output: str = "next", state: Path | None = None, **config: Any
) -> Round:
    given = AggregateConfig(**{"privacy": GAUSSIAN, **config})
    base, following = folder / "base.safetensors", folder / f"{output}.safetensors"
    return run_round(paths, base, following, given, state=state, budget=budget)


def moved(done: Round, weights: Weights) -> NDArray[np.float64]:
    return flat(read_weights(done.output).tensors) - flat(weights.tensors)


FLOATS = arrays(np.float32, (3, 40), elements=st.floats(width=32, allow_nan=False, allow_infinity=False))


@given(rows=FLOATS, noise=st.floats(1e-3, 1e6), clip=st.floats(1e-6, 1e6))
def test_one_client_moves_the_sum_by_at_most_the_clip(rows: NDArray[np.float32], noise: float, clip: float) -> None:
    mechanism = Gaussian(clip=clip, noise=noise, expected=3, epsilon=1.0, delta=1e-5)
    norms = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
    factors = mechanism.factors(norms)
    whole, without = clipped_sum(rows, factors), clipped_sum(rows[1:], factors[1:])
    steps = [Fraction(value) for value in whole - without]
    # In exact arithmetic: a step is clip · noise / RESOLUTION.
    assert sum(step * step for step in steps) * Fraction(noise) ** 2 <= Fraction(RESOLUTION) ** 2
    assert all(step.denominator == 1 for step in steps)
    assert steps == [Fraction(value) for value in clipped(rows[:1], factors[:1])[0]]


def test_a_change_within_the_clip_counts_as_it_is() -> None:
    rows = np.array([[0.25, -0.125]], np.float32)
    mechanism = find_mechanism(GAUSSIAN)
    steps = clipped(rows, mechanism.factors(np.array([0.28])))
    assert steps[0] * mechanism.step * mechanism.expected == pytest.approx(rows[0], rel=1e-5)


@pytest.mark.parametrize("factor", [1.0, -1e4, 1e30])
def test_a_round_with_a_client_and_without_it_differ_by_its_clipped_change(
    factor: float, tmp_path: Path, weights: Weights
) -> None:
    change = {name: np.float32(factor) * values for name, values in random_tensors(LAYOUT, 5).items()}
    paths = [*(send(tmp_path, weights, name) for name in CLIENTS), send(tmp_path, weights, "eve", change=change)]
    both, alone = (
        aggregated(tmp_path, *sent, budget=Silent(), output=name)
        for sent, name in ((paths, "both"), (paths[:-1], "alone"))
    )
    difference = 4 * (moved(both, weights) - moved(alone, weights))
    norm = np.linalg.norm(difference)
    assert norm == pytest.approx(0.5, rel=1e-4)  # of float32 weights
    assert difference @ flat(change) / norm == pytest.approx(np.linalg.norm(flat(change)), rel=1e-4)
    eve = both.aggregation.accepted[-1]
    assert (eve.client, eve.bounded, eve.share) == ("eve", ("clip",), 0.25)


def test_examples_do_not_count_and_neither_does_the_number_of_clients(tmp_path: Path, weights: Weights) -> None:
    change = {name: np.float32(1e-3) * values for name, values in random_tensors(LAYOUT, 5).items()}
    few = aggregated(tmp_path, send(tmp_path, weights, "ann", change=change), budget=Silent(), output="few")
    paths = [send(tmp_path, weights, name, change=change, examples=k + 1) for k, name in enumerate(CLIENTS)]
    many = aggregated(tmp_path, *paths, budget=Silent(), output="many")
    assert moved(many, weights) - moved(few, weights) == pytest.approx(3 / 4 * flat(change), abs=1e-6)


def test_the_noise_on_the_weights_is_as_large_as_accounted_for(tmp_path: Path, weights: Weights) -> None:
    change = {name: np.zeros_like(values) for name, values in random_tensors(LAYOUT, 5).items()}
    with open_privacy_ledger(tmp_path / "privacy", cheap) as ledger:
        done = aggregated(tmp_path, send(tmp_path, weights, "ann", change=change), budget=ledger)
    noise = moved(done, weights)
    assert np.sqrt(np.mean(noise**2)) == pytest.approx(0.5 * 1.5 / 4, rel=4 / math.sqrt(2 * len(noise)))


def test_noise_is_gaussian_and_each_key_has_its_own() -> None:
    count = 200_001
    noise = gaussian_integers(b"key", count, RESOLUTION)
    assert (noise == gaussian_integers(b"key", count, RESOLUTION)).all()
    other = gaussian_integers(b"kex", count, RESOLUTION)
    assert abs(np.corrcoef(noise, other)[0, 1]) < 5 / math.sqrt(count)
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 5 / math.sqrt(count)
    assert (noise == np.rint(noise)).all()
    unit = np.sort(noise) / RESOLUTION
    normal = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in unit[::10]])
    # Kolmogorov and Smirnov's distance, of which 2 / √n is exceeded with a probability of 0.0007
    assert np.abs(normal - np.arange(0, count, 10) / count).max() < 2 / math.sqrt(count)
    for modulus in (2, 3, 256):  # all integers are reached alike, even the low bits of those that are large
        found = np.bincount((noise[np.abs(noise) > RESOLUTION] % modulus).astype(int), minlength=modulus)
        expected = found.sum() / modulus
        assert np.square(found - expected).sum() / expected < modulus + 6 * math.sqrt(2 * modulus)


@pytest.mark.parametrize(("noise", "epochs", "published"), [(1.3, 15, 1.19), (1.1, 60, 3.01), (0.7, 45, 7.10)])
def test_the_ledger_has_the_numbers_of_dp_accounting_for_published_cases(
    noise: float, epochs: int, published: float
) -> None:
    """MNIST, 60,000 examples in batches of 256, δ 1e-5: the table of TensorFlow Privacy's tutorial."""
    rounds, event = epochs * 60_000 // 256, PoissonSampledDpEvent(256 / 60_000, GaussianDpEvent(noise))
    orders = [1 + x / 10 for x in range(1, 100)] + [*range(11, 64), 128, 256, 512]
    renyi = RdpAccountant(orders)
    renyi.compose(SelfComposedDpEvent(event, rounds))
    conversion = [found + math.log(1e5) / (order - 1) for found, order in zip(renyi._rdp, orders, strict=True)]
    assert min(conversion) == pytest.approx(published, abs=0.006)  # the case is the published one
    found = epsilon([(noise, 256 / 60_000)] * rounds, 1e-5)
    assert 0.7 * published < found < published
    if epochs == 15:  # the others take seconds
        tight = PLDAccountant()
        tight.compose(event, rounds)
        assert found == tight.get_epsilon(1e-5)


def test_a_known_case_in_closed_form() -> None:
    """Four rounds with noise 2 are one with noise 1, whose δ at ε is Balle and Wang's (2018, arXiv 1805.06530)."""
    found = epsilon([(2.0, 1.0)] * 4, 1e-5)

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    assert phi(0.5 - found) - math.exp(found) * phi(-0.5 - found) == pytest.approx(1e-5, rel=1e-2)


@pytest.fixture
def sent(tmp_path: Path, weights: Weights) -> list[Path]:
    return [send(tmp_path, weights, name) for name in CLIENTS]


def entries(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "privacy.json").read_text())["spent"]
    return found


def test_a_round_is_paid_for_before_it_is_written(
    tmp_path: Path, sent: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedpara_edge.aggregation.round.write_weights", lambda *_, **__: (_ for _ in ()).throw(Kill))
    with open_privacy_ledger(tmp_path / "privacy", cheap) as ledger, pytest.raises(Kill):
        aggregated(tmp_path, *sent, budget=ledger)
    assert not (tmp_path / "next.safetensors").exists()
    assert [(entry["round"], entry["noise"], entry["sampling"]) for entry in entries(tmp_path / "privacy")] == [
        (4, 1.5, 1.0)
    ]


class Kill(BaseException):
    pass


def test_a_round_that_is_done_again_is_the_same_and_costs_nothing(tmp_path: Path, sent: list[Path]) -> None:
    results = []
    for output, paths in (("one", sent), ("again", sent[::-1]), ("other", sent[:-1])):
        with open_privacy_ledger(tmp_path / "privacy", cheap) as ledger:
            results.append(aggregated(tmp_path, *paths, budget=ledger, output=output).output.read_bytes())
    assert results[0] == results[1]
    assert len(entries(tmp_path / "privacy")) == 2


def test_a_round_that_was_written_is_not_paid_for_again_with_other_updates(tmp_path: Path, sent: list[Path]) -> None:
    with open_privacy_ledger(tmp_path / "privacy", cheap) as ledger:
        aggregated(tmp_path, *sent, budget=ledger, state=tmp_path / "state")
        (tmp_path / "next.safetensors").unlink()
        with pytest.raises(OutputExistsError, match="files of round 4, found others"):
            aggregated(tmp_path, *sent[1:], budget=ledger, state=tmp_path / "state")
        assert len(entries(tmp_path / "privacy")) == 1
        aggregated(tmp_path, *sent, budget=ledger, state=tmp_path / "state")


def test_another_sum_has_another_noise(tmp_path: Path, sent: list[Path], weights: Weights) -> None:
    with open_privacy_ledger(tmp_path / "privacy", cheap) as ledger:
        one, other = (
            moved(aggregated(tmp_path, *paths, budget=ledger, output=str(len(paths))), weights)
            for paths in (sent, sent[:-1])
        )
    # The difference of two noises, not of two clipped changes alone.
    assert np.linalg.norm(one - other) > 1.2 * 0.5 * 1.5 / 4 * math.sqrt(len(one))


def test_nothing_is_released_beyond_the_budget(tmp_path: Path, sent: list[Path]) -> None:
    tight = GAUSSIAN.replace("epsilon=20", "epsilon=1.5")
    with open_privacy_ledger(tmp_path / "privacy", cheap) as ledger:
        aggregated(tmp_path, *sent, budget=ledger, privacy=tight)
        with pytest.raises(
            BudgetError, match=r"expected at most ε 1\.5 at δ 1e-05, found 2 with round 4 after 1"
        ) as found:
            aggregated(tmp_path, *sent[:-1], budget=ledger, privacy=tight, output="more")
        assert found.value.exit_code == 8
    assert not (tmp_path / "more.safetensors").exists()
    assert len(entries(tmp_path / "privacy")) == 1


def test_a_round_that_fails_costs_nothing(tmp_path: Path, sent: list[Path]) -> None:
    for path in sent:
        data = path.read_bytes()
        path.write_bytes(data[:-4] + np.float32(np.nan).tobytes())
    with open_privacy_ledger(tmp_path / "privacy", cheap) as ledger, pytest.raises(TooFewUpdatesError):
        aggregated(tmp_path, *sent, budget=ledger)
    assert not (tmp_path / "privacy" / "privacy.json").exists()


def test_the_ledger_is_for_its_owner_alone(tmp_path: Path, sent: list[Path]) -> None:
    with open_privacy_ledger(tmp_path / "privacy", cheap) as ledger:
        aggregated(tmp_path, *sent, budget=ledger)
    path = tmp_path / "privacy" / "privacy.json"
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    refused = pytest.raises(InputError, match="expected a ledger that its owner alone can read")
    with refused, open_privacy_ledger(tmp_path / "privacy", cheap):
        pass


DAMAGES = (
    lambda data: data.update(secret="00"),
    lambda data: data.update(version=2),
    lambda data: data.pop("spent"),
    lambda data: data["spent"][0].update(noise=0),
    lambda data: data["spent"][0].update(noise="1.5"),
    lambda data: data["spent"][0].pop("tag"),
    lambda data: data["spent"].append(3),
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_ledger_is_refused(damage: Any, tmp_path: Path, sent: list[Path]) -> None:
    with open_privacy_ledger(tmp_path / "privacy", cheap) as ledger:
        aggregated(tmp_path, *sent, budget=ledger)
    path = tmp_path / "privacy" / "privacy.json"
    data = json.loads(path.read_text())
    damage(data)
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="found a damaged file"), open_privacy_ledger(tmp_path / "privacy", cheap):
        pass


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("rule", {"rule": "median"}),
        ("rule", {"rule": "norm-bounded"}),
        ("mixing", {"mixing": "bucketing"}),
        ("weighting", {"weighting": "examples"}),
        ("merge", {"merge": "refit"}),
        ("algorithm", {"algorithm": "scaffold", "clients": 9}),
        ("algorithm", {"algorithm": "feddyn", "clients": 9}),
        ("max_norm", {"max_norm": 3.0}),
        ("max_examples", {"max_examples": 3.0}),
        ("max_share", {"max_share": 0.5}),
    ],
)
def test_what_lets_a_client_do_more_is_refused_by_name(key: str, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"expected .* with privacy") as found:
        AggregateConfig(privacy=GAUSSIAN, **options)
    assert found.value.key == key


@pytest.mark.parametrize("algorithm", ["fedavgm", "fedadam:lr=0.01"])
def test_server_algorithms_go_on_from_the_noisy_mean(algorithm: str, tmp_path: Path, sent: list[Path]) -> None:
    weights = tmp_path / "base.safetensors"
    config = AggregateConfig(privacy=GAUSSIAN, algorithm=algorithm)
    start_round(tmp_path, number=0)
    paths = [send(tmp_path, read_weights(weights), name) for name in CLIENTS]
    done = run_round(paths, weights, tmp_path / "next.safetensors", config, state=tmp_path / "s", budget=Silent())
    assert done.number == 1
    assert sent


def test_running_statistics_are_refused(tmp_path: Path) -> None:
    norm = (tensor("norm.mean", (3,), part="mean"), tensor("norm.variance", (3,), part="variance"))
    weights = start_round(tmp_path, Layout((), (tensor("w", (2,)), *norm)))
    change = random_tensors(weights.layout, 3)
    with pytest.raises(InputError, match=r"sends no running statistics .* found 'norm\.mean' and 1 more"):
        aggregated(tmp_path, send(tmp_path, weights, "ann", change=change), budget=Silent())


def test_noise_and_ledger_go_together(tmp_path: Path, sent: list[Path]) -> None:
    with pytest.raises(InputError, match="privacy: expected the ledger of its budget, found none"):
        aggregated(tmp_path, *sent, budget=None)
    with pytest.raises(InputError, match="privacy: expected noise for the ledger of a budget, found none"):
        aggregated(tmp_path, *sent, budget=Silent(), privacy=None)


def test_a_round_with_noise_says_so_and_is_not_audited(tmp_path: Path, sent: list[Path]) -> None:
    base, listing = tmp_path / "base.safetensors", tmp_path / "transcript.json"
    config = AggregateConfig(privacy=GAUSSIAN)
    done = run_round(sent, base, tmp_path / "next.safetensors", config, transcript=listing, budget=Silent())
    transcript = read_transcript(listing)
    assert transcript.config["privacy"] == GAUSSIAN
    with pytest.raises(InputError, match="expected the transcript of a round without noise, found gaussian noise"):
        audit(transcript, sent, base, done.output)


def test_a_simulated_round_is_the_same_each_time(tmp_path: Path, sent: list[Path]) -> None:
    results = []
    for name in ("one", "other"):
        folder = JobFolder(tmp_path / name)
        folder.make(CLIENTS)
        for client, path in zip(CLIENTS, sent, strict=True):
            shutil.copyfile(path, folder.update(client))
        base = tmp_path / "base.safetensors"
        aggregate_round(folder, round=3, clients=CLIENTS, weights=base, config=AggregateConfig(privacy=GAUSSIAN))
        results.append(folder.weights(4).read_bytes())
    assert results[0] == results[1]


def test_weights_that_explode_are_nobodys_fault(tmp_path: Path, sent: list[Path]) -> None:
    loud = "gaussian:clip=1e7,noise=1,expected=1,epsilon=20,delta=1e-5"
    with pytest.raises(FedparaError, match="after the step of algorithm fedavg"):
        aggregated(tmp_path, *sent, budget=Silent(), privacy=loud)


def test_the_command_spends_and_refuses(tmp_path: Path, sent: list[Path], run: Command) -> None:
    privacy = "gaussian:clip=0.5,noise=5,expected=4,epsilon=1,delta=1e-5"

    def aggregate(*paths: Path, output: str) -> Any:
        files = ["--weights", tmp_path / "base.safetensors", "-o", tmp_path / output]
        return run("aggregate", *paths, *files, "--privacy", privacy, "--privacy-ledger", tmp_path / "dp", "--json")

    done = aggregate(*sent, output="next.safetensors")
    assert done.code == 0
    spent = done.json["privacy"]["spent"]
    assert spent == pytest.approx(epsilon([(5.0, 1.0)], 1e-5))
    assert done.json["gap"] is None
    assert aggregate(*sent, output="next.safetensors").json["privacy"]["spent"] == spent
    beyond = aggregate(*sent[1:], output="more.safetensors")
    assert beyond.code == 8
    assert "expected at most ε 1 at δ 1e-05, found 1.06" in beyond.err
    assert not (tmp_path / "more.safetensors").exists()
