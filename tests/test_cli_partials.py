"""`aggregate --partial`, `merge` and `finalize` as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Bad, Command, check_refused
from small_round import random_tensors, send, start_round


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the updates a to f of round 0, of which f is 50 times as large as the others."""
    weights = start_round(tmp_path, number=0)
    for client in "abcde":
        send(tmp_path, weights, client)
    large = {name: 50 * value for name, value in random_tensors(weights.layout, 3, 0.1).items()}
    send(tmp_path, weights, "f", change=large)
    monkeypatch.chdir(tmp_path)
    return tmp_path


WEIGHTS = ("--weights", "base.safetensors")


def test_a_tree_is_the_exact_pass_and_is_audited(run: Command, here: Path) -> None:
    one = run("aggregate", "--partial", "a.update", "b.update", *WEIGHTS, "-o", "one", "--json").json
    assert (one["clients"], one["examples"], one["round"], one["rejected"]) == (["a", "b"], 20, 0, [])
    assert (
        "other: partial of round 1 from 3 updates (30 examples), 0 rejected"
        in run("aggregate", "--partial", *(f"{client}.update" for client in "cde"), *WEIGHTS, "-o", "other").out
    )
    assert run("merge", "one", "other", *WEIGHTS, "-o", "merged").code == 0
    files = [f"{client}.update" for client in "abcdef"]
    ended = run("finalize", "merged", "f.update", *WEIGHTS, "-o", "tree", "--transcript", "tree.json")
    assert (ended.code, ended.err.count("outlier f.update: client 'f'")) == (0, 1)
    assert run("aggregate", "--exact", *files, *WEIGHTS, "-o", "single").code == 0
    assert (here / "tree").read_bytes() == (here / "single").read_bytes()
    assert run("audit", "tree.json", *files, *WEIGHTS, "--published", "tree").code == 0
    assert json.loads((here / "tree.json").read_text())["config"]["exact"] is True


def test_a_command_that_is_given_again_changes_nothing(run: Command) -> None:
    for _ in range(2):
        assert run("aggregate", "--partial", "a.update", "b.update", *WEIGHTS, "-o", "part").code == 0
        assert run("finalize", "part", *WEIGHTS, "-o", "next", "--state", "server").code == 0
    assert run("merge", "part", "c.update", *WEIGHTS, "-o", "part").code == 2
    assert run("aggregate", "--partial", "c.update", *WEIGHTS, "-o", "part").code == 7


def part(folder: Path) -> None:
    from fedpara_edge import make_partial

    make_partial([folder / f"{client}.update" for client in "abcdef"], folder / "base.safetensors", folder / "part")


REFUSED: dict[str, Bad] = {
    "an option of the whole round": (
        None,
        ("aggregate", "--partial", "a.update", *WEIGHTS, "-o", "out", "--max-norm", "3"),
        2,
        "--max-norm: expected without --partial",
    ),
    "a file of the whole round": (
        None,
        ("aggregate", "--partial", "a.update", *WEIGHTS, "-o", "out", "--transcript", "t"),
        2,
        "--transcript: expected without --partial",
    ),
    "a rule": (
        None,
        ("aggregate", "--partial", "a.update", *WEIGHTS, "-o", "out", "--rule", "krum"),
        2,
        "--rule: expected mean in exact sums and partials, found krum",
    ),
    "an outlier whose file is not there": (
        part,
        ("finalize", "part", *WEIGHTS, "-o", "out"),
        2,
        "part: expected the updates of clients 'f' beside the partials, as a bound binds them",
    ),
    "a ledger without a list": (
        part,
        ("merge", "part", *WEIGHTS, "-o", "out", "--ledger", "ledger"),
        2,
        "--ledger: expected with --allow, found without",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(name: str, run: Command, here: Path) -> None:
    check_refused(run, here, REFUSED[name])


def test_a_partial_of_another_algorithm(run: Command, here: Path) -> None:
    part(here)
    ended = run("finalize", "part", *WEIGHTS, "-o", "out", "--algorithm", "fedavgm", "--state", "server", "--strict")
    assert ended.code == 3
    assert "part: algorithm: expected fedavgm, found fedavg; make it with the server's options" in ended.err
