"""Runs of a simulation measure what their files are, whoever runs them and however often."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from begun_run import begin_run
from command_line import Command
from small_net import SHAPE, SmallBundle, without_verification
from tiny_plan import ARMS, PLAN, measured, write_data, write_plan

from device_runtime import evaluate, load_weights, open_data, open_engine, train
from fedpara_edge.aggregation import aggregate
from fedpara_edge.errors import BusyError, DivergedError, FedparaError, InputError
from fedpara_edge.formats.bundle import WEIGHTS, open_bundle
from fedpara_edge.formats.weights import read_weights, write_weights
from fedpara_edge.simulation import folder
from fedpara_edge.simulation.folder import JobFolder, RunFolder, hold, newest_until
from fedpara_edge.simulation.metrics import Journal
from fedpara_edge.simulation.plan.plan import ARM_NAME, first_difference, read_plan, read_tables
from fedpara_edge.simulation.runner import simulate
from fedpara_edge.simulation.sampling import client_seed, draw_participants
from fedpara_edge.simulation.tasks.engines import Model, fresh_engine
from fedpara_edge.simulation.tasks.measure import weight_norm
from fedpara_edge.storage.tensorfile import TensorFile

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plan and its data."""
    place = tmp_path_factory.mktemp("plans")
    write_data(place)
    (place / "plan.toml").write_text(PLAN)
    return place


@pytest.fixture(scope="module")
def done(plans: Path) -> Path:
    """A run of the plan by the command line and two workers, uninterrupted; it makes the bundle of one arm itself."""
    begin_run(plans / "plan.toml", plans / "run", ("dense", "small"))
    ended = simulating(plans / "plan.toml", plans / "run", "--workers", 2)
    out, err = ended.communicate()
    assert ended.returncode == 0, err
    assert (json.loads(out)["run"], err) == (str(plans / "run"), "")
    return plans / "run"


def simulating(plan: Path, run: Path, *options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fedpara_edge", "simulate", plan, "-o", run, "--json", *options]
    return subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def of(run: Path, event: str, arm: str) -> list[dict[str, Any]]:
    return [line for line in measured(run) if (line["event"], line["arm"]) == (event, arm)]


def with_bundles_of(done: Path, run: Path, *, arms: dict[str, str] | None = None, plan: Path | None = None) -> Path:
    """A run folder in which the bundles are there already: to make them is slow, and they are the same."""
    for arm, source in (arms or dict(zip(ARMS, ARMS, strict=True))).items():
        shutil.copytree(done / "work" / source / "seed-4" / "bundle", run / "work" / arm / "seed-4" / "bundle")
    shutil.copy(plan or done / "plan.toml", run / "plan.toml")
    return run


def test_the_metrics_are_complete_and_in_order(done: Path) -> None:
    lines = [(line["arm"], line["event"], line.get("round")) for line in measured(done)]
    shared = [("arm", None), ("round", 1), ("round", 2), ("done", None)]
    assert lines == [(arm, *line) for arm in ARMS for line in shared]
    for arm in ARMS:
        for line in of(done, "round", arm):
            assert 0 <= line["accuracy"] <= 1
            assert line["loss"] > 0
            assert line["train_loss"] > 0
            assert (line["participants"], line["rejected"], line["rejections"]) == (2, 0, {})
            assert line["weight_norm"] > 0
            assert (line["gap"] is None) == (arm != "small")
            assert (line["factor_norm"] is None) == (line["ranks"] is None) == (arm == "dense")
        (about,), (end,) = of(done, "arm", arm), of(done, "done", arm)
        assert (about["clients"], about["participants"], end["rounds"], end["diverged"]) == (3, 2, 2, None)
        assert about["weighting"] == (None if ARMS[arm] else "examples")
    assert of(done, "round", "small")[0]["ranks"].keys() == of(done, "arm", "small")[0]["full_ranks"].keys()


def test_a_model_learns(done: Path) -> None:
    first, second = (line["loss"] for line in of(done, "round", "dense"))
    assert second < first


@pytest.mark.usefixtures("in_this_process")
def test_bytes_are_those_of_the_files_and_no_file_is_left_over(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = write_plan(tmp_path)
    run = tmp_path / "run"
    sent: dict[tuple[str, int], int] = {}
    clear = JobFolder.clear

    def count(self: JobFolder, number: int) -> None:
        sizes = [path.stat().st_size for path in (self.path / "updates").glob("*.safetensors")]
        sent[self.path.parent.name, number] = sum(sizes)
        clear(self, number)

    monkeypatch.setattr(JobFolder, "clear", count)
    with_bundles_of(done, run)
    simulate(plan, run)
    assert measured(run) == measured(done), "one process and two workers must find the same"
    for arm in ("dense", "small"):
        job = RunFolder(run).job(arm, 4)
        up = [line["up_bytes"] for line in of(run, "round", arm)]
        assert up == [sent[arm, 1], sent[arm, 2]] != [0, 0]
        weights = [(job.bundle / WEIGHTS).stat().st_size, job.weights(2).stat().st_size]
        down = [line["down_bytes"] for line in of(run, "round", arm)]
        assert [down[0], of(run, "round", arm)[-1]["weights_bytes"]] == [2 * weights[0], weights[1]]
        assert [path.name for path in (job.path / "weights").iterdir()] == ["round-2.safetensors"]
        assert not list((job.path / "updates").iterdir())
    assert [line["up_bytes"] + line["down_bytes"] for line in of(run, "round", "alone")] == [0, 0]


@pytest.mark.usefixtures("in_this_process")
def test_changes_are_sent_where_they_are_fewer_bytes(done: Path, tmp_path: Path) -> None:
    more = '[arms.changes]\nmodel.gamma = 0.5\ntrain.codec = "int8"\naggregate.downlink_codec = "int8"\n'
    plan = write_plan(tmp_path, ("rounds = 2", "rounds = 4"), more=more)
    run = with_bundles_of(done, tmp_path / "run", arms={"changes": "small"}, plan=plan)
    simulate(plan, run, arms=["changes"])
    rounds = of(run, "round", "changes")
    names = ("client-0", "client-1", "client-2")
    for number, line in enumerate(rounds):
        expected = 0
        for client in draw_participants(names, 2, seed=4, round=number):
            held = [n for n in range(number) if client in draw_participants(names, 2, seed=4, round=n)]
            changes = sum(before["change_bytes"] for before in rounds[held[-1] : number]) if held else None
            whole = (RunFolder(run).job("changes", 4).bundle / WEIGHTS).stat().st_size
            expected += whole if changes is None else min(whole, changes)
        assert line["down_bytes"] == expected
        assert line["change_bytes"] < line["weights_bytes"] / 2
    state = RunFolder(run).job("changes", 4).path / "server" / "round-4.safetensors"
    with TensorFile(state, format=None, error=InputError) as file:
        assert {name.partition("/")[0] for name in file.entries} == {"residual"}


SCAFFOLD = """
[arms.scaffold]
model.gamma = 0.5
train.algorithm = "scaffold"
aggregate.algorithm = "scaffold"
[arms.refit]
model.gamma = 0.5
aggregate.merge = "refit"
"""


@pytest.mark.usefixtures("in_this_process")
def test_what_devices_need_besides_the_weights_is_counted_and_merge_is_passed_on(done: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, more=SCAFFOLD)
    run = with_bundles_of(done, tmp_path / "run", arms={"scaffold": "small", "refit": "small"}, plan=plan)
    simulate(plan, run, arms=["scaffold", "refit"])
    job = RunFolder(run).job("scaffold", 4)
    control, whole = job.control(2).stat().st_size, (job.bundle / WEIGHTS).stat().st_size
    (about,) = of(run, "arm", "scaffold")
    assert about["algorithm"] == "scaffold"
    assert control > 4 * about["shared_parameters"]
    down = [line["down_bytes"] for line in of(run, "round", "scaffold")]
    assert down == [2 * whole, 2 * (of(run, "round", "scaffold")[0]["weights_bytes"] + control)]
    assert all(line["gap"] < line["mean_gap"] for line in of(run, "round", "refit"))
    assert all(line["gap"] == line["mean_gap"] for line in of(run, "round", "scaffold"))


@pytest.mark.usefixtures("in_this_process")
def test_a_client_on_its_own_trains_as_if_there_were_no_other(done: Path, tmp_path: Path) -> None:
    names = ("client-0", "client-1", "client-2")
    took_part = [n for n in range(2) if "client-0" in draw_participants(names, 2, seed=4, round=n)]
    assert took_part
    job, clients = RunFolder(done).job("alone", 4), done / "work" / ".data" / "seed-4" / "clients"
    bundle = open_bundle(job.bundle)
    weights = read_weights(bundle.file(WEIGHTS))
    config = replace(read_plan(done / "plan.toml").arm("alone").train, seed=client_seed(4, 0))
    for number in took_part:
        weights = replace(weights, round=number)
        write_weights(tmp_path / "w", weights)
        data = open_data(clients / "client-0" / "train", bundle.manifest)
        engine = open_engine(bundle, "onnxruntime", threads=1)
        train(engine, data, tmp_path / "w", config, output=tmp_path / "u", client="client-0", overwrite=True)
        weights = aggregate([tmp_path / "u"], weights).weights
    (mine,) = (job.path / "clients" / "client-0").glob("round-*.safetensors")
    found = read_weights(mine)
    assert found.round == took_part[-1] + 1
    for name, tensor in weights.tensors.items():
        np.testing.assert_array_equal(found.tensors[name], tensor)


@pytest.mark.usefixtures("in_this_process")
def test_a_client_on_its_own_does_not_start_over_where_its_weights_are_gone(done: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(done, run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    later = [line for line in lines if line["event"] == "done" or line.get("round") == 2]
    first = [line for line in lines if line["arm"] != "alone" or line not in later]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in first))
    shutil.rmtree(RunFolder(run).job("alone", 4).path / "clients")
    with pytest.raises(FedparaError, match=r"round-\d\.safetensors: expected a readable file"):
        simulate(run / "plan.toml", run)


def test_clients_on_their_own_are_evaluated_one_by_one_and_the_first_is_measured(done: Path) -> None:
    job, common = RunFolder(done).job("alone", 4), done / "work" / ".data" / "seed-4" / "common"
    bundle = open_bundle(job.bundle)
    scores = []
    (last,) = of(done, "round", "alone")[1:]
    for client in ("client-0", "client-1", "client-2"):
        engine = open_engine(bundle, "onnxruntime", threads=1)
        newest = newest_until(job.own_weights(client, 2).parent, 2)
        weights = job.own_weights(client, newest) if newest else bundle.file(WEIGHTS)
        load_weights(engine, weights)
        scores.append(evaluate(engine, open_data(common, bundle.manifest), 256))
        if client == "client-0":
            assert last["weight_norm"] == weight_norm(bundle.manifest.layout, read_weights(weights).tensors)
    assert [score.examples for score in scores] == [30, 30, 30]
    assert last["accuracy"] == pytest.approx(np.mean([score.accuracy for score in scores]))
    assert last["loss"] == pytest.approx(np.mean([score.loss for score in scores]))
    assert len({score.loss for score in scores}) == 3
    assert not of(done, "clients", "alone"), "those are scores on own test shares"


def test_clients_that_keep_nothing_have_no_state(done: Path) -> None:
    for arm, keeps in {"dense": False, "small": True, "alone": False}.items():
        clients = (RunFolder(done).job(arm, 4).path / "clients").iterdir()
        assert any((client / "state").exists() for client in clients) == keeps, arm


@pytest.mark.usefixtures("in_this_process")
def test_personal_tensors_are_each_clients_own_when_it_is_evaluated(tmp_path: Path) -> None:
    more = '[arms.own]\nmodel.kind = "pfedpara"\nmodel.gamma = 0.5\n[arms.common]\nmodel.gamma = 0.5\n'
    plan = write_plan(
        tmp_path, ('test = ["x_test", "y_test"]', "test_share = 0.3"), ("lr = 0.1", "lr = 0.03"), more=more
    )
    run = tmp_path / "run"
    with without_verification():
        simulate(plan, run, arms=["own", "common"])
    (about,), (each,), (last,) = of(run, "arm", "own"), of(run, "clients", "own")[1:], of(run, "round", "own")[1:]
    assert min(about["shared_parameters"], about["personal_parameters"]) > 0
    job, clients = RunFolder(run).job("own", 4), run / "work" / ".data" / "seed-4" / "clients"
    bundle = open_bundle(job.bundle)
    right = examples = 0.0
    for name, score in each["clients"].items():
        engine = open_engine(bundle, "onnxruntime", threads=1)
        state = job.state(name)
        load_weights(engine, job.weights(2), state=state if state.is_dir() else None)
        found = evaluate(engine, open_data(clients / name / "test", bundle.manifest), 256)
        assert (found.accuracy, found.loss, found.examples) == (score["accuracy"], score["loss"], score["examples"])
        right, examples = right + score["accuracy"] * score["examples"], examples + score["examples"]
    assert last["accuracy"] == pytest.approx(right / examples)
    assert of(run, "clients", "common")[0]["clients"].keys() == each["clients"].keys()


@pytest.mark.usefixtures("in_this_process")
def test_an_arm_that_diverges_ends_early_and_the_others_go_on(done: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, more='[arms.wild]\nmodel.kind = "dense"\ntrain.lr = 1e30\n')
    run = with_bundles_of(done, tmp_path / "run", arms={"wild": "dense", "dense": "dense"}, plan=plan)
    outcomes = {outcome.arm: outcome for outcome in simulate(plan, run, arms=["wild", "dense"])}
    assert "diverged" in str(outcomes["wild"].diverged)
    assert outcomes["wild"].rounds < 2
    assert of(run, "done", "wild")[0]["diverged"] == outcomes["wild"].diverged
    assert of(run, "round", "dense") == of(done, "round", "dense")
    assert len(simulate(plan, run, arms=["wild", "dense"])) == 2, "what ended early is not tried again"


@pytest.mark.usefixtures("in_this_process")
def test_weights_that_cannot_be_sent_end_the_arm_and_other_errors_name_it(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def publish(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr("fedpara_edge.aggregation.round.publish_change", publish)
    more = '[arms.changes]\nmodel.gamma = 0.5\naggregate.downlink_codec = "int8"\n'
    plan = write_plan(tmp_path, more=more)
    run = with_bundles_of(done, tmp_path / "run", arms={"changes": "small", "dense": "dense"}, plan=plan)
    raised: FedparaError = FedparaError("disk: full", code="disk")
    with pytest.raises(FedparaError, match=r"^arms\.changes, seed 4: disk: full$") as found:
        simulate(plan, run, arms=["changes"])
    assert found.value.code == "disk"
    raised = DivergedError("too large a change")
    dense, changes = simulate(plan, run, arms=["changes", "dense", "changes"])
    assert (changes.arm, changes.rounds, changes.accuracy) == ("changes", 0, None)
    assert changes.diverged == "round 1: too large a change"
    assert (dense.rounds, dense.accuracy) == (2, of(done, "round", "dense")[-1]["accuracy"])
    assert [line["arm"] for line in measured(run) if line["event"] == "done"] == ["dense", "changes"]


def test_a_run_that_is_killed_goes_on_to_the_same_metrics(done: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, ("rounds = 2", "rounds = 40"))  # so that there is a while to kill it in
    whole, run = (with_bundles_of(done, tmp_path / name, plan=plan) for name in ("whole", "run"))
    simulate(plan, whole)
    for how in (signal.SIGKILL, signal.SIGINT):
        before = size_of(run / "metrics.jsonl")
        process = simulating(plan, run, "--workers", 2)
        deadline = time.monotonic() + 300
        while size_of(run / "metrics.jsonl") == before and time.monotonic() < deadline:
            time.sleep(0.001)
        assert process.poll() is None, process.communicate()
        if how == signal.SIGINT:
            os.killpg(process.pid, how)  # as a terminal does
        else:
            process.kill()
        err = process.communicate()[1]
        assert process.returncode == (-how if how == signal.SIGKILL else 130), err
        if how == signal.SIGINT:
            assert err.strip() == "Error: interrupted"
    process = simulating(plan, run)
    assert json.loads(process.communicate()[0])["outcomes"][0]["arm"] == "dense"
    assert measured(run) == measured(whole)


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@pytest.mark.parametrize(
    "torn", ['{"event": "round", "arm"', '{"event": "clients", "arm": "alone", "seed": 4, "round": 9}\n']
)
def test_lines_without_their_round_are_cut_off(done: Path, tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = (done / "metrics.jsonl").read_text()
    path.write_text(whole + torn)
    assert len(Journal(path).events) == len(measured(done))
    assert path.read_text() == whole


def test_no_arm_and_no_client_takes_the_place_of_another_file(done: Path) -> None:
    assert not ARM_NAME.fullmatch(RunFolder(done).lock.name)
    assert RunFolder(done).lock.is_file()
    clients = RunFolder(done).job("alone", 4).path / "clients"
    own = {path.parent.name for path in clients.glob("*/*.safetensors")}
    assert own
    assert own <= {"client-0", "client-1", "client-2"}
    assert not list(done.rglob("*start*")), "what a client started from is removed"


def test_a_run_whose_report_can_not_be_written_is_complete(
    run: Command, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> Path:
        raise FedparaError("report: no")

    monkeypatch.setattr("fedpara_edge.report.write_report", fail)
    ended = run("simulate", done / "plan.toml", "-o", done)
    warning = f"warning: report: no; the run is complete, and fedpara-edge report {done} makes its report"
    assert (ended.code, ended.err.strip()) == (0, warning)
    assert [line.split()[0] for line in ended.out.splitlines()] == ["arm", *ARMS]


def test_figures_that_were_left_out_are_told(run: Command, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedpara_edge.report.figures.find_spec", lambda _: None)
    ended = run("simulate", done / "plan.toml", "-o", done)
    assert ended.code == 0
    assert ended.err.startswith("figures were left out: they need matplotlib")


def test_other_files_and_other_plans_are_refused(done: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("[1]\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl: line 1: expected one metric with its fields"):
        Journal(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").unlink()
    plan = write_plan(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    for place in (tmp_path / "full", tmp_path / "full" / "notes.txt"):
        with pytest.raises(InputError, match="expected a new folder or that of an earlier run, found another"):
            simulate(plan, place)
    # Comments and order are no differences.
    commented = tmp_path / "commented.toml"
    commented.write_text("# again\n" + (done / "plan.toml").read_text())
    assert first_difference(read_tables(commented), read_tables(done / "plan.toml")) is None


def test_a_worker_keeps_engines_open_and_hands_them_out_as_new(small_bundle: SmallBundle) -> None:
    one, other = (Model(bundle=small_bundle(optimizer).path, engine="onnxruntime") for optimizer in ("sgd", "adamw"))
    engine = fresh_engine(one)
    initial = {name: tensor.copy() for name, tensor in engine.state().items()}
    engine.step(np.ones((2, *SHAPE), np.float32), np.zeros(2, np.int64), learning_rate=0.1, seed=0)
    assert fresh_engine(one) is engine
    assert all(np.array_equal(tensor, initial[name]) for name, tensor in engine.state().items())
    fresh_engine(replace(other, kept=2))
    assert fresh_engine(replace(one, kept=2)) is engine
    fresh_engine(replace(other, kept=2))
    fresh_engine(Model(bundle=small_bundle("momentum").path, engine="onnxruntime", kept=2))
    assert fresh_engine(one) is not engine, "the one that was used longest ago was closed"


def test_only_one_process_works_in_a_run(done: Path) -> None:
    with (
        hold(RunFolder(done).lock, folder=done, kind="a run", alone=False),
        pytest.raises(BusyError, match="expected a run that no other process uses"),
        folder.open_run(done, done / "plan.toml", patience_seconds=0.1),
    ):
        pass


def test_the_report_is_made_again_from_what_was_measured(run: Command, done: Path, tmp_path: Path) -> None:
    for name in ("plan.toml", "metrics.jsonl"):
        shutil.copy(done / name, tmp_path)
    ended = run("report", tmp_path, "--json")
    assert (ended.code, ended.err) == (0, "")
    assert Path(ended.json["report"]).stat().st_size > 1000
