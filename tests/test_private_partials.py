"""Trees of partials under noise: clipped at the leaves, noisy and paid for once at the root, as a single pass is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_line import Command
from small_round import random_tensors, send, start_round, tensor
from test_privacy import GAUSSIAN, Silent, cheap

from fedpara_edge.aggregation import AggregateConfig, Round, run_round
from fedpara_edge.aggregation.gate import HashingGate
from fedpara_edge.aggregation.gathering import gather
from fedpara_edge.aggregation.partials import make_partial
from fedpara_edge.errors import InputError, InvalidUpdateError, WrongBundleError
from fedpara_edge.factors.layout import Layout
from fedpara_edge.formats.partial import Digits, write_partial
from fedpara_edge.formats.weights import Weights, read_weights
from fedpara_edge.privacy.budget import Budget
from fedpara_edge.privacy.ledger import open_privacy_ledger

PRIVATE = AggregateConfig(privacy=GAUSSIAN, exact=True)
CLIENTS = "abcdefg"
LARGE = "cf"
"""Clients whose changes are far above the clip; those of `d` are below it."""
TREES = {
    "leaves": ["abc", "de", "fg"],
    "a leaf for each": list(CLIENTS),
    "merged twice": [["ab", ["c", "d"]], "efg"],
    "updates beside": ["abc", *(f"{client}.update" for client in "defg")],
    "one in two of them": ["abcd", "defg", "d.update"],
    "one within another": ["abcdefg", "bc"],
}


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    base = start_round(tmp_path)
    for number, client in enumerate(CLIENTS):
        size = 30.0 if client in LARGE else 1e-4 if client == "d" else 1.0
        change = {name: np.float32(size) * value for name, value in random_tensors(base.layout, number, 0.1).items()}
        send(tmp_path, base, client, change=change, codec="int8" if client == "b" else "float32")
    return base


def sum_of(tree: object, folder: Path, config: AggregateConfig = PRIVATE) -> Path:
    """The file of a tree: an update, a partial of some clients' updates, or one of other partials."""
    if isinstance(tree, str) and tree.endswith(".update"):
        return folder / tree
    parts = [folder / f"{client}.update" for client in tree] if isinstance(tree, str) else []
    parts += [sum_of(each, folder, config) for each in tree] if isinstance(tree, list) else []
    output = folder / f"{''.join(each for each in str(tree) if each.isalnum() or each == ',')}.partial"
    make_partial(parts, folder / "base.safetensors", output, config, overwrite=True)
    return output


def finished(folder: Path, *paths: Path, output: str, budget: Budget, config: AggregateConfig = PRIVATE) -> Round:
    return run_round(paths, folder / "base.safetensors", folder / output, config, budget=budget)


def updates(folder: Path) -> list[Path]:
    return [folder / f"{client}.update" for client in CLIENTS]


@pytest.mark.parametrize("name", TREES)
def test_a_tree_of_clipped_changes_is_the_single_pass(name: str, tmp_path: Path, weights: Weights) -> None:  # noqa: ARG001
    with open_privacy_ledger(tmp_path / "ledger", cheap) as ledger:
        single = finished(
            tmp_path, *updates(tmp_path), output="single", budget=ledger, config=AggregateConfig(privacy=GAUSSIAN)
        )
        tree = finished(tmp_path, *(sum_of(each, tmp_path) for each in TREES[name]), output="tree", budget=ledger)
        assert ledger.spent(1e-5) == 1  # the same sum, so that it was paid for
    assert tree.output.read_bytes() == single.output.read_bytes()
    told = [
        {each.client: (each.norm, each.scale, each.bounded, each.share) for each in done.aggregation.accepted}
        for done in (single, tree)
    ]
    assert told[0] == told[1]
    assert {client for client, (*_, bounded, _) in told[0].items() if bounded} == {*CLIENTS} - {"d"}


def test_exact_sums_of_the_updates_are_the_single_pass_too(tmp_path: Path, weights: Weights) -> None:  # noqa: ARG001
    done = [
        finished(tmp_path, *updates(tmp_path), output=f"exact-{exact}", budget=Silent(),
                 config=AggregateConfig(privacy=GAUSSIAN, exact=exact))
        for exact in (False, True)
    ]  # fmt: skip
    assert done[0].output.read_bytes() == done[1].output.read_bytes()


def test_the_order_of_the_tree_changes_no_byte_of_a_partial(tmp_path: Path, weights: Weights) -> None:  # noqa: ARG001
    whole = sum_of("abcdefg", tmp_path).read_bytes()
    assert sum_of([["gf", "ea"], "dcb"], tmp_path).read_bytes() == whole
    again = make_partial(
        [sum_of("abcd", tmp_path), sum_of("defg", tmp_path), tmp_path / "d.update"],
        tmp_path / "base.safetensors", tmp_path / "again", PRIVATE,
    )  # fmt: skip
    assert again.output.read_bytes() == whole


@pytest.mark.parametrize(
    ("privacy", "found"),
    [
        (GAUSSIAN.replace("clip=0.5", "clip=0.6"), "'clip': 0.6"),
        (GAUSSIAN.replace("noise=1.5", "noise=1.4"), "'noise': 1.4"),
        (None, "found none"),
    ],
)
def test_a_partial_that_was_clipped_otherwise_is_refused_by_name(
    privacy: str | None, found: str, tmp_path: Path, weights: Weights  # noqa: ARG001
) -> None:  # fmt: skip
    other = replace(PRIVATE, privacy=privacy, weighting="equal")
    part = sum_of("abc", tmp_path, other)
    with pytest.raises(InvalidUpdateError, match=f"abc.partial: privacy: expected .*'clip': 0.5.*{found}") as refused:
        finished(tmp_path, part, tmp_path / "d.update", output="next", budget=Silent())
    assert refused.value.code == "wrong_algorithm"
    assert not (tmp_path / "next").exists()


def test_a_partial_that_was_clipped_is_nothing_for_a_round_without_noise(
    tmp_path: Path, weights: Weights  # noqa: ARG001
) -> None:  # fmt: skip
    plain = AggregateConfig(exact=True, weighting="equal")
    done = run_round(
        [sum_of("abc", tmp_path), tmp_path / "d.update"], tmp_path / "base.safetensors", tmp_path / "next", plain
    )
    (refused,) = done.aggregation.rejected
    assert (refused.code, "privacy: expected none, found {" in refused.reason) == ("wrong_algorithm", True)


def test_a_partial_that_is_refused_ends_the_round_and_costs_nothing(tmp_path: Path, weights: Weights) -> None:
    (tmp_path / "other").mkdir()
    later = start_round(tmp_path / "other", number=4)
    send(tmp_path / "other", later, "a")
    strange = sum_of("a", tmp_path / "other")
    assert later.base != weights.base
    with open_privacy_ledger(tmp_path / "ledger", cheap) as ledger:
        with pytest.raises(WrongBundleError, match=r"a\.partial: round: expected 3, found 4"):
            finished(tmp_path, strange, sum_of("bc", tmp_path), output="next", budget=ledger)
        assert ledger.spent(1e-5) == 0
    plain = AggregateConfig(exact=True)
    part = sum_of("bc", tmp_path, plain)
    done = run_round([strange, part], tmp_path / "base.safetensors", tmp_path / "next", plain)
    assert len(done.aggregation.accepted) == 2  # without noise, the others go on


def test_a_client_with_two_updates_in_two_parts_counts_in_none(tmp_path: Path, weights: Weights) -> None:
    second = send(tmp_path, weights, "a", name="second")
    here, there = sum_of("ab", tmp_path), tmp_path / "there"
    make_partial([second, tmp_path / "c.update"], tmp_path / "base.safetensors", there, PRIVATE)
    with pytest.raises(InputError, match=r"expected the updates of clients 'a', 'a' beside the partials"):
        finished(tmp_path, here, there, output="next", budget=Silent())
    with_files = finished(tmp_path, here, there, tmp_path / "a.update", second, output="next", budget=Silent())
    without = finished(tmp_path, *(tmp_path / f"{name}.update" for name in "bc"), output="bc", budget=Silent())
    assert with_files.output.read_bytes() == without.output.read_bytes()


def test_a_sum_that_clipped_changes_can_not_have_is_refused_before_it_is_paid_for(
    tmp_path: Path, weights: Weights
) -> None:
    files = [tmp_path / "a.update", tmp_path / "b.update"]
    mechanism = PRIVATE.mechanism
    assert mechanism is not None
    gathered = gather(
        files, weights, PRIVATE.server_algorithm, weighting="equal", mechanism=mechanism, gate=HashingGate()
    )
    made = gathered.to_partial()
    large = np.zeros_like(made.sums["mean/0"].rows)
    large[0, 0] = 2 * mechanism.limit * 1.01
    write_partial(tmp_path / "forged", replace(made, sums={**made.sums, "mean/0": Digits(lowest=0, rows=large)}))
    with open_privacy_ledger(tmp_path / "ledger", cheap) as ledger:
        with pytest.raises(InvalidUpdateError, match="forged: expected a sum of 2 clipped changes, found a larger one"):
            finished(tmp_path, tmp_path / "forged", output="next", budget=ledger)
        assert ledger.spent(1e-5) == 0


def test_the_commands_clip_at_the_leaves_and_spend_at_the_root(
    tmp_path: Path, weights: Weights, run: Command, monkeypatch: pytest.MonkeyPatch  # noqa: ARG001
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    options = ("--weights", "base.safetensors", "--privacy", GAUSSIAN)
    for name in ("ab", "cd"):
        files = [f"{client}.update" for client in name]
        assert run("aggregate", "--partial", *files, *options, "-o", name).code == 0
    assert run("merge", "cd", "e.update", *options, "-o", "cde").code == 0
    root = ("finalize", "ab", "cde", "f.update", "g.update", *options)
    assert run(*root, "-o", "next").code == 2  # no folder for the ledger
    ended = run(*root, "-o", "next", "--privacy-ledger", "ledger", "--json")
    assert (ended.code, ended.json["privacy"]["clip"], len(ended.json["accepted"])) == (0, 0.5, 7)
    spent = ended.json["privacy"]["spent"]
    assert 0 < spent < 20
    again = run("aggregate", *(path.name for path in updates(tmp_path)), *options, "-o", "single", "--privacy-ledger",
                "ledger", "--json")  # fmt: skip
    assert (again.code, again.json["privacy"]["spent"]) == (0, spent)
    assert read_weights(tmp_path / "single").base == read_weights(tmp_path / "next").base
    tight = GAUSSIAN.replace("epsilon=20", f"epsilon={spent}")
    refused = run("finalize", "ab", *options[:2], "--privacy", tight, "-o", "more", "--privacy-ledger", "ledger")
    assert (refused.code, (tmp_path / "more").exists()) == (8, False)
    for wrong in (("aggregate", "--partial", "a.update", *options, "-o", "p", "--privacy-ledger", "ledger"),
                  ("finalize", "ab", *options[:2], "-o", "p", "--privacy-ledger", "ledger")):  # fmt: skip
        ended = run(*wrong)
        assert (ended.code, "--privacy-ledger: expected with" in ended.err) == (2, True)


def test_a_model_that_sends_running_statistics_makes_no_private_partial(tmp_path: Path) -> None:
    norm = (tensor("norm.mean", (3,), part="mean"), tensor("norm.variance", (3,), part="variance"))
    weights = start_round(tmp_path, Layout((), (tensor("w", (2,)), *norm)))
    update = send(tmp_path, weights, "a", change=random_tensors(weights.layout, 3))
    with pytest.raises(InputError, match="sends no running statistics with privacy"):
        make_partial([update], tmp_path / "base.safetensors", tmp_path / "part", PRIVATE)
