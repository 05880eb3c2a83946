"""Simulated devices that go away or are too slow: how many, which, and what the round makes of it."""

import shutil
from pathlib import Path

import pytest
from begun_run import begin_run
from hypothesis import given
from hypothesis import strategies as st
from tiny_plan import measured, write_plan

from fedpara_edge.errors import InputError
from fedpara_edge.formats.weights import read_weights
from fedpara_edge.simulation import folder
from fedpara_edge.simulation.folder import RunFolder
from fedpara_edge.simulation.plan.devices import GONE, LATE, DevicesPlan
from fedpara_edge.simulation.plan.plan import read_plan
from fedpara_edge.simulation.runner import simulate

NUMBERS = {f"client-{number}": number for number in range(40)}
"""Clients by name."""


@given(
    examples=st.lists(st.integers(1, 500), min_size=1, max_size=40),
    dropout=st.floats(0, 0.99),
    slowest=st.floats(1, 100),
    deadline=st.one_of(st.none(), st.floats(1, 5)),
    round=st.integers(0, 9),
)
def test_the_share_drops_out_and_somebody_always_stays(
    examples: list[int], dropout: float, slowest: float, deadline: float | None, round: int
) -> None:
    devices = DevicesPlan(dropout=dropout, slowest=slowest, deadline=deadline)
    called = dict(zip(NUMBERS, examples, strict=False))
    missing = devices.missing(called, NUMBERS, seed=3, round=round)
    assert list(missing.values()).count(GONE) == int(dropout * len(called))
    assert missing == devices.missing(called, NUMBERS, seed=3, round=round)
    assert missing.keys() < called.keys()


def test_who_is_late_is_slow_in_every_round_and_who_is_gone_is_drawn() -> None:
    called = dict.fromkeys(NUMBERS, 10)
    slow = [DevicesPlan(slowest=9, deadline=1.5).missing(called, NUMBERS, seed=0, round=n) for n in range(2)]
    assert slow[0] == slow[1]
    assert 5 < len(slow[0]) < 20
    assert set(slow[0].values()) == {LATE}
    lost = [DevicesPlan(dropout=0.5).missing(called, NUMBERS, seed=0, round=n) for n in range(2)]
    assert lost[0] != lost[1]
    assert not DevicesPlan(slowest=9).missing(called, NUMBERS, seed=0, round=0), "all are waited for"


def test_who_has_more_examples_takes_longer() -> None:
    called = {"a": 10, "b": 10, "c": 31}
    assert DevicesPlan(deadline=3).missing(called, dict.fromkeys(called, 0), seed=0, round=0) == {"c": LATE}


@pytest.mark.usefixtures("in_this_process")
def test_a_round_counts_who_is_there_and_goes_on_as_if_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = write_plan(
        tmp_path,
        ("participants = 2\n", ""),
        ("rounds = 2", "rounds = 3"),
        ("[data]", "[devices]\ndropout = 0.4\n[data]"),
    )
    begin_run(plan, tmp_path / "run", ("small", "alone"))
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    simulate(plan, tmp_path / "run", arms=["small", "alone"])
    rounds = [line for line in measured(tmp_path / "run") if line["event"] == "round"]
    assert len(rounds) == 6
    for line in rounds:
        assert (line["participants"], line["rejections"]) == (3, {GONE: 1})
        assert (line["down_bytes"] % 3, line["down_bytes"] > 0) == (0, line["arm"] == "small"), "all three are called"

    def cut(self: folder.JobFolder, number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt
        clear(self, number)

    clear = folder.JobFolder.clear
    with monkeypatch.context() as patched:
        patched.setattr(folder.JobFolder, "clear", cut)
        with pytest.raises(KeyboardInterrupt):
            simulate(plan, tmp_path / "again", arms=["small", "alone"])
    simulate(plan, tmp_path / "again", arms=["small", "alone"])
    assert measured(tmp_path / "again") == measured(tmp_path / "run")
    last = [RunFolder(tmp_path / name).job("small", 4).weights(3) for name in ("run", "again")]
    assert read_weights(last[0]).base == read_weights(last[1]).base


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("dropout = 1.0", "devices.dropout: expected a number of at least 0 and below 1, found 1.0"),
        ("slowest = 0.5", "devices.slowest: expected a number of at least 1, found 0.5"),
        ("deadline = 0.9", "devices.deadline: expected a number of at least 1, found 0.9"),
        ("dropuot = 0.1", "devices.dropuot: expected a key of this table"),
    ],
)
def test_a_bad_table_is_refused_by_its_key(tmp_path: Path, line: str, text: str) -> None:
    with pytest.raises(InputError, match=text):
        read_plan(write_plan(tmp_path, ("[data]", f"[devices]\n{line}\n[data]")))
