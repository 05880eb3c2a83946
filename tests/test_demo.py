"""The demo: its federation by the commands a user types, its table, and its images."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from command_line import Command

from fedpara_edge.cli.demo import summary
from fedpara_edge.demo.federation import KINDS, RESULT, Federation, Outcome, run_demo
from fedpara_edge.errors import FedparaError, InputError


def ignore(*_: object) -> None:
    """Take whatever the demo tells."""


def outcome(kind: str, *, megabytes: float) -> Outcome:
    return Outcome(kind=kind, parameters=40_628, accuracy=0.82, megabytes_per_round=megabytes)


@pytest.mark.slow
def test_a_federation_runs_by_commands_and_learns(tmp_path: Path) -> None:
    shown: list[str] = []
    rounds: list[tuple[str, int]] = []

    def on_command(words: Sequence[str]) -> None:
        shown.append(words[0])

    def on_round(kind: str, number: int, accuracy: float, seconds: float) -> None:
        assert seconds > 0
        assert 0 < accuracy < 1
        rounds.append((kind, number))

    federation = Federation(folder=tmp_path / "run", model="mlp", clients=2, rounds=1)
    (found,) = run_demo(federation, on_command, on_round, kinds=["dense"])
    assert shown == ["export", "train", "aggregate", "evaluate"]
    assert rounds == [("dense", 1)]
    assert found.accuracy > 0.6
    assert found.parameters == 203_530
    assert found.megabytes_per_round == pytest.approx(2 * 2 * 4 * 203_530 / 1e6, rel=0.01)
    assert json.loads((tmp_path / "run" / RESULT).read_text(encoding="utf-8")) == [vars(found)]


def test_a_command_that_fails_ends_the_demo(tmp_path: Path) -> None:
    federation = Federation(folder=tmp_path / "run", clients=10_001)
    with pytest.raises(FedparaError, match=r"fedpara-edge split: expected it to end with 0, found 2: .*found 10001"):
        run_demo(federation, ignore, ignore)


def test_a_folder_of_somebody_else_is_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="expected a new folder or one of an earlier demo"):
        run_demo(Federation(folder=tmp_path), ignore, ignore)
    assert (tmp_path / "thesis.tex").exists()


def test_the_table_has_a_row_for_each_kind_and_shares_of_the_dense_bytes(tmp_path: Path) -> None:
    outcomes = [outcome(kind, megabytes=megabytes) for kind, megabytes in zip(KINDS, (3.35, 31.4, 3.3), strict=True)]
    lines = summary(Federation(folder=tmp_path), outcomes, seconds=200.4).splitlines()
    assert lines[1] == "cnn on Fashion-MNIST, 10 devices, Dirichlet(0.5), 6 rounds, local epochs 1, seed 0:"
    assert lines[3].split("  ")[0] == "model"
    assert [line.split()[-1] for line in lines[4:7]] == ["10.7%", "100.0%", "10.5%"]
    assert lines[-1] == "MB a round: updates up and weights down, all devices. 200 s in all."


def test_the_images_are_written_for_a_session_of_ones_own(run: Command, tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    ended = run("demo", "--images", path)
    assert ended.code == 0, ended.err
    with np.load(path) as images:
        shapes = {name: (images[name].shape, images[name].dtype.name) for name in images}
    assert shapes == {
        "x_train": ((10_000, 1, 28, 28), "uint8"),
        "y_train": ((10_000,), "int64"),
        "x_test": ((2_000, 1, 28, 28), "uint8"),
        "y_test": ((2_000,), "int64"),
    }
    again = run("demo", "--images", path)
    assert again.code == 7
    assert str(path) in again.err
