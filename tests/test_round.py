"""A round on its files: what is written belongs together, whenever it is cut short, and nothing is lost or mixed up."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_round
from failing_disk import full_disk

from fedpara_edge.aggregation import AggregateConfig, Round, aggregate, run_round
from fedpara_edge.aggregation.config import COUNTING
from fedpara_edge.aggregation.round import LOCK
from fedpara_edge.algorithms import SERVER
from fedpara_edge.errors import (
    BusyError,
    FedparaError,
    InputError,
    OutputExistsError,
    TooFewUpdatesError,
    WrongBundleError,
)
from fedpara_edge.formats.change import apply_change
from fedpara_edge.formats.serverstate import RESIDUAL, read_server_state
from fedpara_edge.formats.weights import read_weights, write_weights
from fedpara_edge.options import declared
from fedpara_edge.storage.locking import hold
from fedpara_edge.storage.rounds import round_path

LOSSY = AggregateConfig(algorithm="fedavgm", downlink_codec="int4")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Weights of round 0."""
    small_round.start_round(tmp_path, number=0)
    return tmp_path / "base.safetensors"


def updates_for(folder: Path, weights: Path, clients: str = "abc") -> list[Path]:
    read = read_weights(weights)
    return [small_round.send(folder, read, client, name=f"{read.round}-{client}") for client in clients]


def run_rounds(folder: Path, weights: Path, count: int, config: AggregateConfig = LOSSY, **options: Any) -> list[Round]:
    """Some rounds in a row, whose files are in a folder, the state in `state`."""
    done: list[Round] = []
    for number in range(count):
        updates = updates_for(folder, weights)
        number = read_weights(weights).round + 1
        change = folder / f"{number}.change" if config.downlink_codec else None
        output = folder / f"{number}.weights"
        done.append(run_round(updates, weights, output, config, state=folder / "state", change=change, **options))
        weights = output
    return done


def states(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "state").iterdir() if path.name != LOCK)


def test_a_round_is_what_aggregate_makes_of_the_updates(tmp_path: Path, base: Path) -> None:
    updates = updates_for(tmp_path, base)
    config = AggregateConfig(algorithm="fedadam:lr=0.1,beta1=0.5", weighting="equal", merge="refit")
    calls: list[tuple[int, int]] = []
    done = run_round(
        updates,
        base,
        tmp_path / "next",
        config,
        state=tmp_path / "state",
        on_progress=lambda read, of: calls.append((read, of)),
    )
    expected = aggregate(
        updates, read_weights(base), algorithm=config.server_algorithm, weighting="equal", merge="refit"
    )
    write_weights(tmp_path / "expected", expected.weights)
    assert done.output.read_bytes() == (tmp_path / "expected").read_bytes()
    assert done.aggregation.to_json() == expected.to_json()
    assert calls == [(3, 3)]
    assert (done.number, done.output, done.change, done.change_bytes) == (1, tmp_path / "next", None, None)
    assert done.weights_bytes == done.output.stat().st_size
    assert done.state == round_path(tmp_path / "state", 1)
    assert read_server_state(done.state).base == read_weights(done.output).base
    plain = json.loads(json.dumps(done.to_json(), allow_nan=False))
    assert (plain["output"], plain["state"], "change" in plain) == (str(done.output), str(done.state), False)
    assert plain["algorithm"] == {"name": "fedadam", "lr": 0.1, "beta1": 0.5, "tau": 0.001, "beta2": 0.99}


def test_nothing_is_kept_where_nothing_has_to_be(tmp_path: Path, base: Path) -> None:
    done = run_round(map(str, updates_for(tmp_path, base)), str(base), str(tmp_path / "next"))
    assert done.output == tmp_path / "next"
    assert (done.state, done.aggregation.state) == (None, None)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".safetensors", *[".update"] * 3]


def test_published_weights_are_those_that_devices_get(tmp_path: Path, base: Path) -> None:
    weights = base
    for done in run_rounds(tmp_path, base, 3):
        assert done.change is not None
        assert done.change_bytes == done.change.stat().st_size < done.weights_bytes
        applied = apply_change(read_weights(weights), done.change)
        assert applied.base == read_weights(done.output).base == done.aggregation.weights.base
        assert done.aggregation.state is not None
        assert RESIDUAL in done.aggregation.state.groups
        weights = done.output


def test_files_of_another_round_or_of_other_updates_are_not_replaced(tmp_path: Path, base: Path) -> None:
    (first,) = run_rounds(tmp_path, base, 1)
    updates, written = updates_for(tmp_path, base), first.output.read_bytes()
    options: dict[str, Any] = {"change": first.change, "state": tmp_path / "state"}
    run_round(updates, base, first.output, LOSSY, **options)
    with pytest.raises(OutputExistsError, match="expected a new output, found an existing one"):
        run_round(updates[1:], base, first.output, LOSSY, **options)
    with pytest.raises(OutputExistsError):  # before any update is read
        run_round([tmp_path / "none"], first.output, first.output.with_name("base.safetensors"), AggregateConfig())
    assert first.output.read_bytes() == written


def test_no_input_is_written_over(tmp_path: Path, base: Path) -> None:
    updates, written = updates_for(tmp_path, base), base.read_bytes()
    for output in (base, updates[0]):
        with pytest.raises(InputError, match="expected an output beside its inputs, found one of them"):
            run_round(updates, base, output, AggregateConfig(), overwrite=True)
    assert base.read_bytes() == written


def test_a_state_folder_is_for_one_round_at_a_time(tmp_path: Path, base: Path) -> None:
    run_rounds(tmp_path, base, 1)
    with (
        hold(tmp_path / "state" / LOCK, folder=tmp_path / "state", kind="a state folder"),
        pytest.raises(BusyError, match="expected a state folder that no other process uses"),
    ):
        run_rounds(tmp_path, tmp_path / "1.weights", 1)


def test_old_states_are_removed_after_the_commit_alone(tmp_path: Path, base: Path) -> None:
    *_, last = run_rounds(tmp_path, base, 4)
    assert states(tmp_path) == [f"round-{number}.safetensors" for number in (1, 2, 3, 4)]
    (tmp_path / "state" / "round-01.safetensors").touch()
    (tmp_path / "state" / "notes").touch()
    updates = [tmp_path / f"3-{client}.update" for client in "abc"]
    with full_disk(), pytest.raises(FedparaError, match="No space left"):
        run_round(
            updates,
            tmp_path / "3.weights",
            tmp_path / "new",
            LOSSY,
            change=tmp_path / "c",
            state=tmp_path / "state",
            keep=2,
            overwrite=True,
        )
    assert len(states(tmp_path)) == 6
    run_rounds(tmp_path, last.output, 1, keep=3)
    others = ["notes", "round-01.safetensors"]
    assert states(tmp_path) == [*others, *(f"round-{number}.safetensors" for number in (3, 4, 5))]
    run_rounds(tmp_path, tmp_path / "4.weights", 1, keep=2, overwrite=True)
    assert states(tmp_path) == [*others, *(f"round-{number}.safetensors" for number in (4, 5))]


def test_a_round_whose_state_was_removed_is_refused_and_the_newest_can_be_done_again(
    tmp_path: Path, base: Path
) -> None:
    config = AggregateConfig(downlink_codec="int4")  # keeps only what the downlink left out, which could be forgotten
    done = run_rounds(tmp_path, base, 4, config, keep=2)
    written = done[-1].output.read_bytes()
    run_rounds(tmp_path, done[2].output, 1, config, overwrite=True)
    assert done[-1].output.read_bytes() == written
    for number in (1, 2):
        expected = (
            rf"expected the server state of round {number}, found those from round 3 to 4: older ones were removed"
        )
        with pytest.raises(InputError, match=expected):
            run_rounds(tmp_path, done[number - 1].output, 1, config, overwrite=True)
    run_rounds(tmp_path, base, 1, config, overwrite=True)


def test_a_state_folder_may_begin_at_any_round_and_that_round_be_done_again(tmp_path: Path, base: Path) -> None:
    run_rounds(tmp_path, base, 1, AggregateConfig())
    for path in (tmp_path / "state").iterdir():
        path.unlink()
    config = AggregateConfig(downlink_codec="int4")
    (first,) = run_rounds(tmp_path, tmp_path / "1.weights", 1, config)
    written = first.output.read_bytes()
    run_rounds(tmp_path, tmp_path / "1.weights", 1, config, overwrite=True)
    assert first.output.read_bytes() == written


@pytest.mark.parametrize(
    ("weights_at", "change_at", "named"),
    [
        ("next", "next", "for the change, found that of the weights"),
        ("state/round-1.safetensors", "change", "for the server state, found that of the weights"),
        ("next", "state/../state/round-1.safetensors", "for the server state, found that of the change"),
    ],
)
def test_no_file_of_a_round_is_written_over_another(
    weights_at: str, change_at: str, named: str, tmp_path: Path, base: Path
) -> None:
    with pytest.raises(InputError, match=f"expected a file of its own {named}"):
        run_round(
            [],
            base,
            tmp_path / weights_at,
            LOSSY,
            state=tmp_path / "state",
            change=tmp_path / change_at,
            overwrite=True,
        )


UNFIT: dict[str, tuple[AggregateConfig, dict[str, Any], str]] = {
    "no folder": (
        AggregateConfig(algorithm="fedadam"),
        {},
        "state: expected a folder for what algorithm fedadam keeps",
    ),
    "no folder for the downlink": (
        AggregateConfig(downlink_codec="int8"),
        {"change": "c"},
        "state: expected a folder for what the downlink's codec int8 keeps, found none",
    ),
    "no change": (LOSSY, {"state": "s"}, "change: expected a file for the published change, found none"),
    "no codec": (AggregateConfig(), {"change": "c"}, "downlink_codec: expected a codec for the change"),
    "keep of 1": (
        LOSSY,
        {"state": "s", "change": "c", "keep": 1},
        "keep: expected a number of rounds, at least 2, found 1",
    ),
    "keep of nothing": (AggregateConfig(), {"keep": 2}, "keep: expected with a state folder, found none"),
    "a file for a folder": (LOSSY, {"state": "base.safetensors", "change": "c"}, "expected a folder, found another"),
    "no place": (LOSSY, {"state": "s", "change": "nowhere/c"}, "expected an existing folder .*nowhere, found none"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_is_refused_before_anything_is_read_or_written(case: str, tmp_path: Path, base: Path) -> None:
    config, options, message = UNFIT[case]
    given = {name: tmp_path / value if isinstance(value, str) else value for name, value in options.items()}
    with pytest.raises(InputError, match=message) as refused:
        run_round([tmp_path / "none"], base, tmp_path / "next", config, **given)
    key = message.partition(":")[0]
    assert refused.value.key == (key if key in ("state", "change", "keep", "downlink_codec") else None)
    assert not (tmp_path / "next").exists()


def test_a_downlink_with_something_left_to_send_can_not_be_left_out(tmp_path: Path, base: Path) -> None:
    (done,) = run_rounds(tmp_path, base, 1)
    with pytest.raises(
        InputError, match=r"downlink_codec: expected one as in the round before.*float32 leaves nothing"
    ):
        run_rounds(tmp_path, done.output, 1, AggregateConfig(algorithm="fedavgm"))


def test_weights_and_updates_that_can_not_be_used(tmp_path: Path, base: Path) -> None:
    with pytest.raises(InputError, match="expected a readable file"):
        run_round([], tmp_path / "none", tmp_path / "next")
    with pytest.raises(WrongBundleError, match="expected fedpara-edge/weights"):
        run_round([], updates_for(tmp_path, base)[0], tmp_path / "next")
    with pytest.raises(TooFewUpdatesError, match="at least 4 valid updates, found 3"):
        run_round(updates_for(tmp_path, base), base, tmp_path / "next", AggregateConfig(min_updates=4))
    with pytest.raises(FedparaError, match="expected a readable file"):
        run_round([tmp_path / "none"], base, tmp_path / "next", AggregateConfig(strict=True))
    assert not (tmp_path / "next").exists()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "algorithm": ({"algorithm": "fedsgd"}, "algorithm: expected one of fedavg, fedavgm, "),
    "algorithm ": ({"algorithm": "fedavg:momentum=0.5"}, "algorithm: fedavg: momentum: expected an option of it"),
    "algorithm  ": ({"algorithm": "fedavg:lr=nan"}, "algorithm: fedavg: lr: expected a positive number, found nan"),
    "clients": ({"clients": 3}, "clients: expected with algorithm scaffold or feddyn, found with fedavg"),
    "algorithm   ": (
        {"algorithm": "feddyn"},
        "algorithm: feddyn: clients: expected an integer of at least 1, found none",
    ),
    "weighting": ({"weighting": "size"}, "weighting: expected one of examples, equal, found 'size'"),
    "merge": ({"merge": "sum"}, "merge: expected one of mean, refit, found 'sum'"),
    "merge ": ({"merge": "refit", "algorithm": "feddyn", "clients": 2}, "merge: expected mean with algorithm feddyn"),
    "min_updates": ({"min_updates": 0}, "min_updates: expected an integer of at least 1, found 0"),
    "downlink_codec": ({"downlink_codec": "zip"}, "downlink_codec: expected one of float32, "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_is_checked_when_it_is_made(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(InputError) as refused:
        AggregateConfig(**options)
    assert str(refused.value).startswith(message)
    assert refused.value.key == case.strip()


@pytest.mark.parametrize("name", SERVER)
def test_every_option_of_every_server_algorithm_can_be_set(name: str) -> None:
    assert (name in COUNTING) == ("clients" in declared(SERVER[name]))
    given = {"clients": 3} if name in COUNTING else {}
    config = AggregateConfig(algorithm=name, **given)
    for option, value in config.server_algorithm.options().items():
        if isinstance(value, float):
            text = f"{name}:{option}={value / 2!r}"
            changed = AggregateConfig(algorithm=text, **given).server_algorithm
            assert changed == replace(config.server_algorithm, **{option: value / 2})
    assert config.effective_weighting == SERVER[name].weighting
    assert AggregateConfig(algorithm=name, **given, weighting="equal").effective_weighting == "equal"
