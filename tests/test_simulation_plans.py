"""What the plan of a simulation may say, and what is refused before any training."""

from dataclasses import replace
from pathlib import Path

import pytest
from command_line import Command
from journal_lines import NEEDED
from small_net import without_verification
from tiny_plan import PLAN, write_plan

from fedpara_edge.errors import InputError
from fedpara_edge.simulation import folder
from fedpara_edge.simulation.data.clients import write_clients
from fedpara_edge.simulation.folder import RunFolder
from fedpara_edge.simulation.metrics import Journal
from fedpara_edge.simulation.plan.plan import first_difference, read_plan, read_tables
from fedpara_edge.simulation.runner import simulate
from fedpara_edge.simulation.sampling import client_seed, draw_participants

BAD_PLANS: dict[str, tuple[tuple[str, str], str]] = {
    "no class": (("classes = 3", "classes = -1"), "model.classes: expected an integer from 1 to 1048576, found -1"),
    "negative size": (
        ("[1, 4, 4]", "[1, -4, 4]"),
        "model.input_shape: expected a list of integers from 1 to 1048576, found",
    ),
    "refit with feddyn": (
        ("local_only = true", 'train.algorithm = "feddyn"\naggregate.algorithm = "feddyn"\naggregate.merge = "refit"'),
        "arms.alone.aggregate.merge: expected mean with algorithm feddyn, found refit",
    ),
    "unknown setting": (("rounds = 2", "rounds = 2\nround = 3"), "round: expected a key of this table"),
    "unknown table": (("[model]", "[models]"), "models: expected a key of this table, found an unknown one; did you"),
    "unknown data key": (("clients = 3", "clients = 3\nclient = 2"), "data.client: expected a key"),
    "unknown model key": (("classes = 3", "classes = 3\ngama = 0.2"), "model.gama: expected a key"),
    "unknown train key": (("lr = 0.1", "lr = 0.1\nlearning_rate = 1"), "train.learning_rate: expected a key"),
    "unknown key of an arm": (("local_only = true", "local = true"), "arms.alone.local: expected a key"),
    "unknown model key of an arm": (("model.gamma = 0.5\ntrain", "model.gam = 0.5\ntrain"), "arms.small.model.gam: "),
    "rounds of none": (("rounds = 2", "rounds = 0"), "plan.toml: rounds: expected an integer of at least 1, found 0"),
    "rounds in words": (
        ("rounds = 2", 'rounds = "two"'),
        "plan.toml: rounds: expected an integer of at least 1, found 'two'",
    ),
    "seeds alike": (("seeds = [4]", "seeds = [4, 4]"), "seeds: expected different integers"),
    "negative seed": (("seeds = [4]", "seeds = [-1]"), "seeds: expected a list of integers from 0 to"),
    "seeds no list": (("seeds = [4]", "seeds = 4"), "seeds: expected a list of integers from 0 to 4294967295, found 4"),
    "no rounds": (("rounds = 2\n", ""), "rounds: expected an integer of at least 1, found no such key; add it"),
    "no model": (('name = "mlp"\n', ""), "model.name: expected a string, found no such key"),
    "too many participants": (("participants = 2", "participants = 4"), "participants: expected at most the 3 clients"),
    "reference": (
        ("rounds = 2", 'rounds = 2\nreference = "sparse"'),
        "reference: expected one of the arms dense, small",
    ),
    "target": (("rounds = 2", "rounds = 2\ntarget = 80"), "target: expected a number above 0 and below 1, found 80"),
    "nothing to evaluate on": (('test = ["x_test", "y_test"]', ""), "data.test: expected a common test set or"),
    "missing data": (('"data.npz"', '"other.npz"'), "data.path: expected an .npz file or a folder"),
    "missing array": (('"x_test"', '"x_tset"'), "x_tset"),
    "few examples": (("clients = 3", "clients = 3\nmin_examples = 50"), "50"),
    "a former key": (("clients = 3", "clients = 3\nleast = 50"), "data.least: expected min_examples, the present name"),
    "kind": (('kind = "dense"', 'kind = "sparse"'), "arms.dense.model.kind: expected one of fedpara, pfedpara"),
    "kind of all": (("classes = 3", 'classes = 3\nkind = "sparse"'), "model.kind: expected one of fedpara, pfedpara"),
    "gamma": (
        ("gamma = 0.5\nlocal", "gamma = 2\nlocal"),
        "arms.alone.model.gamma: expected a number from 0 to 1, found 2",
    ),
    "learning rate": (("lr = 0.1", "lr = -1"), "train.lr: expected a positive number, found -1"),
    "decay": (("lr_decay = 0.9", "lr_decay = 2"), "train.lr_decay: expected a number above 0 and at most 1"),
    "schedule": (("lr = 0.1", 'lr = 0.1\nschedule = "wave"'), "train.schedule: expected one of constant"),
    "codec": (('codec = "int8"', 'codec = "zip"'), "arms.small.train.codec: expected one of float32"),
    "engine": (("lr = 0.1", 'lr = 0.1\nengine = "tpu"'), "train.engine: expected one of onnxruntime"),
    "local algorithm": (("lr = 0.1", 'lr = 0.1\nalgorithm = "sgd"'), "train.algorithm: expected one of fedavg"),
    "option of another": (("lr = 0.1", 'lr = 0.1\nalgorithm = "fedavg:mu=1"'), "train.algorithm: fedavg: mu: expected"),
    "scaffold alone": (
        ('codec = "int8"', 'algorithm = "scaffold"'),
        "arms.small.train.algorithm: expected scaffold with",
    ),
    "a server's own": (
        ("[arms.dense]", '[aggregate]\nalgorithm = "feddyn"\n[arms.dense]'),
        "expected feddyn with the server's algorithm",
    ),
    "server algorithm": (
        ("[arms.dense]", '[aggregate]\nalgorithm = "sgd"\n[arms.dense]'),
        "aggregate.algorithm: expected",
    ),
    "downlink": (("[arms.dense]", '[aggregate]\ndownlink_codec = "zip"\n[arms.dense]'), "aggregate.downlink_codec: "),
    "snapshots of no use": (
        ("[arms.dense]", "[aggregate]\nsnapshot_every = 2\n[arms.dense]"),
        "aggregate.snapshot_every",
    ),
    "local with a server": (
        ("[arms.alone]", '[arms.alone]\naggregate.algorithm = "fedadam"'),
        "arms.alone.local_only: expected with algorithm fedavg",
    ),
    "name of an arm": (("[arms.alone]", '[arms."../alone"]'), "arms.../alone: expected a name"),
    "no table": (("[train]", "[[train]]"), "train: expected a table"),
    "no TOML": (("[train]", "[train"), "expected a plan in TOML"),
}


@pytest.mark.parametrize("name", BAD_PLANS)
def test_a_bad_plan_is_refused_by_file_and_key_before_anything_is_made(name: str, tmp_path: Path) -> None:
    change, expected = BAD_PLANS[name]
    plan = write_plan(tmp_path, change)
    with pytest.raises(InputError) as raised:
        simulate(plan, tmp_path / "run")
    assert expected in str(raised.value)
    assert not list(tmp_path.glob("run/work/*/*/bundle"))
    if not (tmp_path / "run").exists():  # what only the data can tell is found in the run
        assert str(raised.value).startswith(f"{plan}: ")


def test_no_plan_and_no_arms(run: Command, tmp_path: Path) -> None:
    assert run("simulate", tmp_path / "none.toml", "-o", tmp_path / "run").code == 2
    plan = write_plan(tmp_path)
    plan.write_text(PLAN.partition("[arms.")[0])
    with pytest.raises(InputError, match=r"plan\.toml: arms: expected at least one table \[arms\.NAME\], found none"):
        read_plan(plan)
    with pytest.raises(InputError, match=r"arm 'sparse': expected one of dense, small, alone"):
        simulate(write_plan(tmp_path), tmp_path / "run", arms=["sparse"])


def test_an_arm_overrides_keys_and_keeps_the_others(tmp_path: Path) -> None:
    plan = read_plan(write_plan(tmp_path))
    dense, small, alone = plan.arms
    assert (dense.model.kind, small.model.kind, small.model.gamma) == ("dense", "fedpara", 0.5)
    assert dense.model.input_shape == small.model.input_shape == (1, 4, 4)
    assert (dense.train.codec, small.train.codec, small.train.lr) == ("float32", "int8", 0.1)
    assert (small.local_only, alone.local_only) == (False, True)
    assert dense.train.lr_decay == 0.9
    assert plan.data.path == tmp_path / "data.npz"


UNFIT = {
    "optimizer of scaffold": (
        (
            "[arms.dense]",
            '[arms.dense]\nmodel.momentum = 0.9\naggregate.algorithm = "scaffold"\ntrain.algorithm = "scaffold"',
        ),
        "arms.dense.model.optimizer: expected plain sgd with algorithm scaffold, found momentum 0.9",
    ),
    "sizes of the model": (("[1, 4, 4]", "[1, 5, 5]"), "arms.dense: ", "expected shape [N, 1, 5, 5], found"),
    "classes of the model": (("classes = 3", "classes = 2"), "arms.dense: ", "expected integers in [0, 2), found 2"),
    "unknown model": (('"mlp"', '"mpl"'), "arms.dense: ", "model 'mpl': expected mlp, cnn"),
    "steps": (("lr = 0.1", "lr = 0.1\nwarmup_steps = 99"), "arms.dense", "warmup_steps: expected fewer than the"),
}


@pytest.mark.parametrize("name", UNFIT)
@pytest.mark.usefixtures("in_this_process")
def test_what_does_not_fit_the_bundle_is_refused_before_any_training(name: str, tmp_path: Path) -> None:
    change, *expected = UNFIT[name]
    with pytest.raises(InputError) as raised, without_verification():
        simulate(write_plan(tmp_path, change), tmp_path / "run", arms=["dense"])
    assert all(text in str(raised.value) for text in expected)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_participants_are_the_same_in_all_arms_and_others_in_other_rounds() -> None:
    names = tuple(f"c{number}" for number in range(20))
    drawn = [draw_participants(names, 5, seed=seed, round=number) for seed in range(2) for number in range(10)]
    assert all(len(set(some)) == 5 and list(some) == [n for n in names if n in some] for some in drawn)
    assert len(set(drawn)) > 15
    assert draw_participants(names, 5, seed=0, round=0) == drawn[0]
    assert draw_participants(names, None, seed=0, round=0) == names == draw_participants(names, 20, seed=1, round=3)
    assert len({client_seed(seed, number) for seed in range(10) for number in range(100)}) == 1000


def test_all_arms_of_the_comparison_of_optimizers_weigh_alike() -> None:
    plan = read_plan(Path(__file__).parents[1] / "plans" / "optimizers.toml")
    assert {arm.aggregate.effective_weighting for arm in plan.arms} == {"equal"}
    assert {replace(arm.aggregate, weighting=None).effective_weighting for arm in plan.arms} == {"equal", "examples"}


def test_an_arm_may_have_rounds_of_its_own(tmp_path: Path) -> None:
    plan = read_plan(write_plan(tmp_path, ("[arms.dense]", "[arms.dense]\nrounds = 5")))
    assert [(arm.name, arm.rounds) for arm in plan.arms] == [("dense", 5), ("small", 2), ("alone", 2)]
    with pytest.raises(InputError, match=r"arms\.dense\.rounds: expected an integer of at least 1, found 0"):
        read_plan(write_plan(tmp_path, ("[arms.dense]", "[arms.dense]\nrounds = 0")))


def test_what_was_refused_before_any_training_can_be_corrected(tmp_path: Path) -> None:
    run = tmp_path / "run"
    bad = write_plan(tmp_path, ("participants = 2", "participants = 4"))
    with pytest.raises(InputError, match="participants: expected at most the 3 clients there are, found 4"):
        simulate(bad, run)
    made = RunFolder(run).job("dense", 4).bundle
    made.mkdir(parents=True)
    plan = write_plan(tmp_path)
    with folder.open_run(run, plan) as found:
        assert first_difference(read_tables(found.plan), read_tables(plan)) is None
        assert not made.exists(), "of the plan before"
        made.mkdir(parents=True)
        write_clients(found.data(4), read_plan(plan).data, 4)
    with folder.open_run(run, plan) as found:
        assert made.exists()
        assert not found.data(4).exists(), "the data may have been corrected"
        Journal(found.metrics).append({"event": "arm", "arm": "dense", "seed": 4, **NEEDED["arm"]})
        write_clients(found.data(4), read_plan(plan).data, 4)
    with folder.open_run(run, plan) as found:
        assert found.data(4).exists()
    with (
        pytest.raises(InputError, match="participants: expected 2, found 4"),
        folder.open_run(run, bad_again(tmp_path)),
    ):
        pass


def bad_again(place: Path) -> Path:
    return write_plan(place, ("participants = 2", "participants = 4"))
