"""Federations on Flower: this project's fleet and simulations against Flower's own of the dense model in torch.

The federation is that of plans/fashion-mnist-cnn.toml: FedPara and codecs here, and for stock Flower the dense cnn with
the same images, batches, epochs and optimizer. Nothing is evaluated but after the last round, which does not count, as
the first does not, in which programs start and bundles are sent.

    python benchmarks/fleet.py --nodes 10 --clients 10 --clients 100 --clients 1000

    KB a device up, down   what Flower's record says of the network, by the rounds of a device
    server                 most memory of SuperLink, SuperExec and ServerApp, with pages that they share counted once
    all                    most memory of everything, likewise
    overhead               what a round takes beyond the training on all cores; with nodes, beyond that of `simulate`
    CPU s                  CPU time that a round takes of everything, devices and server
    beyond                 CPU time beyond that of `simulate` with as many clients, which trains and does little else
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from shutil import copy
from statistics import median
from typing import Any

import click
import stock_flower
from cpu import Tree, cpu_at_each
from memory import peaks, processes_below, processes_with_log, proportional_mb, together_mb
from parts import keep_options, measure_parts
from simulating import write_plan

from fedpara_edge.cli.output import table
from fedpara_edge.fleet.ports import LOOPBACK, answers, free_ports
from fedpara_edge.fleet.switches import SWITCHES
from fedpara_edge.simulation.data.clients import read_clients, write_clients
from fedpara_edge.simulation.plan.plan import read_plan
from fedpara_edge.simulation.runner import cores

HERE = Path(__file__).parent
COMMAND = (sys.executable, "-m", "fedpara_edge")
ARMS = {
    "FedPara": '\n[arms.measured]\nmodel.kind = "fedpara"\nmodel.gamma = 0.1\ntrain.lr = 0.004\n',
    "FedPara, int8 both ways": (
        '\n[arms.measured]\nmodel.kind = "fedpara"\nmodel.gamma = 0.1\ntrain.lr = 0.004\n'
        'train.codec = "int8"\naggregate.downlink_codec = "int8"\n'
    ),
}
STOCK = "dense, stock Flower"
ARM, SEED = "measured", 0
PARTICIPANTS = 100
START_SECONDS = 120.0
MEASURES = ("seconds", "cpu", "mb", "kb")
"""What is measured of each federation; results that were kept with fewer are measured again."""
PROJECT = """\
[project]
name = "stock"
version = "1.0.0"
description = "FedAvg of a dense model"
license = { file = "LICENSE" }
dependencies = ["flwr>=1.42,<2"]

[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[tool.flwr.app]
publisher = "stock"
fab-format-version = 1
flwr-version-target = "1.42.0"
fab-include = ["*.py", "LICENSE"]

[tool.flwr.app.components]
serverapp = "stock_flower:server"
clientapp = "stock_flower:client"
"""


def federation(folder: Path, arm: str, *, clients: int, images: int, rounds: int) -> Path:
    """The plan of a federation with one arm, and no more than some participants in a round."""
    path = write_plan(folder, clients, images, rounds)
    text = path.read_text(encoding="utf-8").partition("\n[arms.")[0]
    text = text.replace('reference = "dense"\n', f"participants = {min(PARTICIPANTS, clients)}\n")
    if clients > PARTICIPANTS:  # so few images each that no draw of Dirichlet's has enough for all
        text = text.replace('split = "dirichlet"', 'split = "iid"').replace("alpha = 0.5\n", "")
    path.write_text(text + ARMS[arm], encoding="utf-8")
    return path


def run(*command: Any, log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Start a command whose output goes to a file."""
    with log.open("ab") as file:
        return subprocess.Popen(
            list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a command has done its work.

    Raises:
        ClickException: It failed.
    """
    if process.wait():
        raise click.ClickException(f"{process.args}: {log.read_text(encoding='utf-8')[-2000:]}")


def rounds_of(path: Path) -> list[dict[str, Any]]:
    """The rounds in the metrics of a run folder but for the first and the last."""
    events = map(json.loads, (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [event for event in events if event["event"] == "round"][1:-1]


def ours_on_nodes(arm: str, nodes: int, images: int, rounds: int) -> dict[str, Any]:
    """A fleet of this project."""
    with tempfile.TemporaryDirectory(prefix="fleet-") as name:
        folder = Path(name).resolve()
        plan = federation(folder, arm, clients=nodes, images=images, rounds=rounds)
        log = folder / "said.log"
        recipe = ("--gamma", "0.1", "--batch-size", "16", "--optimizer", "adamw", "--mean", "0.286", "--std", "0.353")
        finish(run(*COMMAND, "export", "cnn", *recipe, "-o", folder / "bundle", log=log), log)
        init = ("fleet", "init", folder / "bundle", "--plan", plan, "--nodes", nodes, "-o", folder / "app")
        finish(run(*COMMAND, *init, log=log), log)
        logs = folder / "app" / "local" / "logs"
        process = run(*COMMAND, "fleet", "up", folder / "app", "-n", nodes, log=log)
        run_folder, server = folder / "app" / "run", [logs / "superlink.log", logs / "server.log"]
        with peaks(_memory(process, server)) as peak, _cpu(process, partial(_rounds_done, run_folder)) as cpu:
            finish(process, log)
        found = rounds_of(run_folder)
        record = (logs / "record.log").read_text(encoding="utf-8")
    return _row(arm, nodes, [event["seconds"] for event in found], peak, cpu, _traffic(record, nodes * rounds))


def theirs_on_nodes(nodes: int, images: int, rounds: int) -> dict[str, Any]:
    """The stock app on Flower's own programs, with their defaults."""
    with tempfile.TemporaryDirectory(prefix="stock-") as name:
        folder = Path(name).resolve()
        options = stock_settings(folder, clients=nodes, images=images, rounds=rounds)
        bin = Path(sys.executable).parent
        path = f"{bin}{os.pathsep}{os.environ['PATH']}"  # where the SuperLink looks for its other programs
        environment = {**SWITCHES, "FLWR_HOME": str(folder), stock_flower.SETTINGS: str(options), "PATH": path}
        del environment["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"]
        link, *ports = free_ports(nodes + 1)
        address = f"{LOOPBACK}:{link}"
        (folder / "config.toml").write_text(
            f'[superlink]\ndefault = "fleet"\n\n[superlink.fleet]\naddress = "{address}"\ninsecure = true\n'
        )
        app, logs = folder / "app", folder / "logs"
        for place in (app, logs):
            place.mkdir()
        (app / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
        (app / "LICENSE").write_text("none\n", encoding="utf-8")
        for module in ("stock_flower.py", "plain.py"):
            copy(HERE / module, app / module)
        with ended() as programs:
            start = ("--insecure", "--host", LOOPBACK, "--port", link, "--disable-runtime-dependency-installation")
            programs.append(run(bin / "flower-superlink", *start, log=logs / "superlink.log", **environment))
            if not answers(link, seconds=START_SECONDS):
                raise click.ClickException(f"SuperLink: {(logs / 'superlink.log').read_text(encoding='utf-8')[-2000:]}")
            for number, port in enumerate(ports):
                config = ("--node-config", f"partition-id={number} num-partitions={nodes}")
                start = ("--insecure", "--superlink", address, "--host", LOOPBACK, "--port", port, *config)
                log = logs / f"node-{number}.log"
                programs.append(run(bin / "flower-supernode", *start, log=log, **environment))
            log = logs / "run.log"
            process = run(bin / "flwr", "run", app, "fleet", "--stream", log=log, **environment)
            with peaks(_memory(None, [logs / "superlink.log"])) as peak, _cpu(None, partial(_times, options)) as cpu:
                finish(process, log)
            listing = subprocess.run(
                [bin / "flwr", "list", "fleet", "--format", "json"],
                env={**os.environ, **environment},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
        seconds = _seconds(options)
    return _row(STOCK, nodes, seconds, peak, cpu, _traffic(listing.stdout, nodes * rounds))


def stock_settings(folder: Path, *, clients: int, images: int, rounds: int) -> Path:
    """Settings of the stock app, with the data of the federation; their file."""
    plan = read_plan(federation(folder, next(iter(ARMS)), clients=clients, images=images, rounds=rounds))
    write_clients(folder / "data", plan.data, SEED)
    data = read_clients(folder / "data")
    arm = plan.arm(ARM)
    content = {
        "clients": [str(data.train(each.name)) for each in data.clients],
        "fraction": min(PARTICIPANTS, clients) / clients,
        "rounds": rounds,
        "times": str(folder / "times.txt"),
        "train": {
            "lr": arm.train.lr / 2,  # the plan's rate for its dense arm is half of FedPara's
            "batch_size": arm.train.batch_size,
            "mean": arm.model.mean,
            "std": arm.model.std,
        },
    }
    path = folder / "settings.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def ours_simulated(engine: str, arm: str, clients: int, images: int, rounds: int) -> dict[str, Any]:
    """A simulation of this project: in its own processes, or on Flower's engine."""
    with tempfile.TemporaryDirectory(prefix="simulated-") as name:
        folder = Path(name).resolve()
        plan = federation(folder, arm, clients=clients, images=images, rounds=rounds)
        log = folder / "said.log"
        more = ("--engine", "flower") if engine == "flower" else ()
        process = run(*COMMAND, "simulate", plan, "-o", folder / "run", *more, log=log)
        with peaks(_memory(process)) as peak, _cpu(process, partial(_rounds_done, folder / "run")) as cpu:
            finish(process, log)
        found = rounds_of(folder / "run")
    training = median(event["train_seconds"] * event["participants"] / cores() for event in found)
    row = _row(f"{arm}, {engine}", clients, [event["seconds"] for event in found], peak, cpu)
    return {**row, "training": training}


def theirs_simulated(clients: int, images: int, rounds: int) -> dict[str, Any]:
    """The stock app in Flower's simulation."""
    with tempfile.TemporaryDirectory(prefix="stock-") as name:
        folder = Path(name).resolve()
        options = stock_settings(folder, clients=clients, images=images, rounds=rounds)
        log = folder / "said.log"
        environment = {**SWITCHES, stock_flower.SETTINGS: str(options), "PYTHONPATH": str(HERE)}
        process = run(sys.executable, HERE / "stock_flower.py", log=log, **environment)
        with peaks(_memory(process)) as peak, _cpu(process, partial(_times, options)) as cpu:
            finish(process, log)
        seconds = _seconds(options)
    return _row(STOCK, clients, seconds, peak, cpu)


def _memory(process: subprocess.Popen[bytes] | None, server: Sequence[Path] = ()) -> dict[str, Callable[[], float]]:
    root = os.getpid() if process is None else process.pid
    serving = (lambda: together_mb({pid for log in server for pid in processes_with_log(log)})) if server else None
    everything = {"all": lambda: proportional_mb(processes_below(root) - {os.getpid()})}
    return everything if serving is None else {"server": serving, **everything}


def _cpu(process: subprocess.Popen[bytes] | None, rounds: Callable[[], int]) -> AbstractContextManager[list[float]]:
    """CPU time after each round, of a process and all below it, or of all that this one has started."""
    return cpu_at_each(rounds, Tree(os.getpid(), with_root=False) if process is None else Tree(process.pid))


def _rounds_done(folder: Path) -> int:
    """Number of rounds in the metrics of a run folder."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b'{"event": "round"') if path.exists() else 0


def _times(options: Path) -> int:
    """Number of rounds after which the stock app noted the time, as it did before the first."""
    path = Path(json.loads(options.read_text(encoding="utf-8"))["times"])
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def _seconds(options: Path) -> list[float]:
    settings = json.loads(options.read_text(encoding="utf-8"))
    times = list(map(float, Path(settings["times"]).read_text(encoding="utf-8").split()))
    if len(times) != settings["rounds"] + 1:
        raise click.ClickException(f"stock Flower: expected {settings['rounds']} rounds, found {len(times) - 1}")
    return [after - before for before, after in pairwise(times)][1:-1]


def _traffic(record: str, answers: int) -> dict[str, float]:
    """Kilobytes that a device sent and got in a round, by Flower's record."""
    found = json.JSONDecoder().raw_decode(record[record.index("{") :])[0]["runs"][0]
    if found["status"] != "finished:completed":
        raise click.ClickException(f"Flower: expected a run that is done, found {found['status']}")
    traffic = found["network-traffic"]
    return {"up": traffic["inbound-bytes"] / answers / 1000, "down": traffic["outbound-bytes"] / answers / 1000}


def _row(
    name: str,
    clients: int,
    seconds: Sequence[float],
    peak: Mapping[str, float],
    cpu: Sequence[float],
    traffic: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    return {
        "federation": name,
        "clients": clients,
        "seconds": median(seconds),
        "cpu": (cpu[-2] - cpu[0]) / len(seconds),
        "mb": dict(peak),
        "kb": dict(traffic or {}),
    }


@contextmanager
def ended() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Programs that are ended with the context, the last first."""
    programs: list[subprocess.Popen[bytes]] = []
    try:
        yield programs
    finally:
        for program in reversed(programs):
            program.terminate()
        deadline = time.monotonic() + START_SECONDS
        for program in programs:
            program.wait(max(0.1, deadline - time.monotonic()))


def report(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables of the results."""
    simulated = {row["clients"]: row for row in results.values() if row["federation"].endswith(", simulate")}
    tables = []
    for title, has_nodes in (("SuperLink and SuperNodes on one machine", True), ("simulations", False)):
        rows = [row for row in results.values() if bool(row["kb"]) == has_nodes]
        header = ["federation", "nodes" if has_nodes else "clients", "s a round", "overhead", "CPU s", "beyond"]
        header += ["KB up", "KB down", "MB server", "MB all"] if has_nodes else ["rounds/min", "MB all"]
        cells = [
            [
                row["federation"],
                row["clients"],
                f"{row['seconds']:.1f}",
                _overhead(row, simulated.get(row["clients"])),
                f"{row['cpu']:.1f}",
                _beyond(row, simulated.get(row["clients"])),
                *([f"{row['kb'][way]:.1f}" for way in ("up", "down")] if has_nodes else [f"{60 / row['seconds']:.1f}"]),
                *(f"{row['mb'][which]:.0f}" for which in ("server", "all") if which in row["mb"]),
            ]
            for row in rows
        ]
        if rows:
            tables.append(f"{title}\n\n{table(header, cells)}")
    return "\n\n".join(tables)


def _overhead(row: Mapping[str, Any], simulated: Mapping[str, Any] | None) -> str:
    if row["federation"] == STOCK or (trained := row if "training" in row else simulated) is None:
        return ""
    return f"{row['seconds'] - trained['training']:.1f}"


def _beyond(row: Mapping[str, Any], simulated: Mapping[str, Any] | None) -> str:
    if simulated is None or row is simulated or row["federation"] == STOCK:
        return ""
    return f"{row['cpu'] - simulated['cpu']:.1f}"


@click.command(help=__doc__)
@click.option("--nodes", default=10, show_default=True, help="SuperNodes; 0 for simulations alone.")
@click.option("--clients", multiple=True, type=int, default=(10, 100, 1000), show_default=True)
@click.option("--images", default=10_000, show_default=True, help="Most images of all clients together.")
@click.option("--rounds", default=6, show_default=True, help="Rounds, at least 3.")
@keep_options
def main(nodes: int, clients: tuple[int, ...], images: int, rounds: int, kept: Path | None, again: bool) -> None:
    parts: dict[str, Callable[[], Any]] = {}
    if nodes:
        for arm in ARMS:
            parts[f"{nodes} nodes, {arm}"] = partial(ours_on_nodes, arm, nodes, images, rounds)
        parts[f"{nodes} nodes, {STOCK}"] = partial(theirs_on_nodes, nodes, images, rounds)
    arm = next(iter(ARMS))
    for count in clients:
        for engine in ("simulate", "flower"):
            parts[f"{count} clients, {engine}"] = partial(ours_simulated, engine, arm, count, images, rounds)
        parts[f"{count} clients, {STOCK}"] = partial(theirs_simulated, count, images, rounds)
    settings = {"images": images, "rounds": rounds, "measures": MEASURES}
    click.echo(report(measure_parts(parts, report, settings=settings, kept=kept, again=again)))


if __name__ == "__main__":
    main()
