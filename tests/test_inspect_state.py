"""`fedpara-edge inspect` on folders: whose state it is, and rounds in the order of their numbers."""

from pathlib import Path

import numpy as np
import pytest
import small_round
from command_line import Command
from numpy.typing import NDArray

from fedpara_edge.algorithms import find_server
from fedpara_edge.factors.layout import LayerSpec, Layout
from fedpara_edge.factors.update import weight_tensors
from fedpara_edge.formats.serverstate import state_of, write_server_state
from fedpara_edge.formats.weights import Weights, write_weights
from fedpara_edge.storage.rounds import round_path
from fedpara_edge.storage.tensorfile import write_tensors


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """A server's state folder with three rounds."""
    layout = Layout((), (small_round.tensor("a", (2,)),))
    for number in (1, 10, 2):
        weights = Weights("ff", number, layout, {"a": np.zeros(2, np.float32)})
        groups = {"momentum": {"a": np.ones(2, np.float32)}}
        write_server_state(round_path(tmp_path, number), state_of(weights, find_server("fedavgm"), groups))
    return tmp_path


def test_a_servers_state_is_the_servers_with_its_rounds_in_order(server: Path, run: Command) -> None:
    shown = run("inspect", server, "--json").json
    assert (shown["format"], shown["of"]) == ("state", "server")
    assert [file["round"] for file in shown["files"]] == [1, 2, 10]
    text = run("inspect", server).out
    assert text.startswith(f"{server}: state of a server\n")
    heads = [f"{server}/round-{number}.safetensors: fedpara-edge/server-state" for number in (1, 2, 10)]
    assert [line for line in text.splitlines() if "server-state" in line] == heads


@pytest.mark.parametrize("formats", [["device-state"], ["device-state", "progress"], ["progress"]])
def test_a_devices_state_is_the_devices(formats: list[str], tmp_path: Path, run: Command) -> None:
    for name in formats:
        write_tensors(tmp_path / f"{name}.safetensors", {}, {"format": f"fedpara-edge/{name}", "version": 1})
    assert run("inspect", tmp_path, "--json").json["of"] == "device"
    assert run("inspect", tmp_path).out.startswith(f"{tmp_path}: state of a device\n")


def test_a_folder_of_other_files_is_nobodys_state(server: Path, run: Command) -> None:
    write_tensors(server / "round-3.safetensors", {}, {"format": ["odd"], "version": 1})
    assert run("inspect", server, "--json").json["of"] is None
    assert run("inspect", server).out.startswith(f"{server}: 4 files\n")


def test_an_empty_folder_is_refused(tmp_path: Path, run: Command) -> None:
    ended = run("inspect", tmp_path)
    assert (ended.code, ended.err) == (
        2,
        f"Error: {tmp_path}: expected a bundle or a state folder, found neither manifest.json nor *.safetensors\n",
    )


def test_the_folder_of_a_run_is_for_the_report(tmp_path: Path, run: Command) -> None:
    (tmp_path / "metrics.jsonl").touch()
    ended = run("inspect", tmp_path)
    assert (ended.code, ended.err) == (
        2,
        f"Error: {tmp_path}: expected a bundle or a state folder, found the metrics.jsonl of a run; fedpara-edge "
        "report shows these\n",
    )


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_layers_of_updates_are_shown_with_scale_period_and_momentum(
    momentum: float, tmp_path: Path, run: Command
) -> None:
    dense = small_round.layer("head", (3, 5), kind="dense")
    update = LayerSpec(
        name="fc", operator="linear", form="matrix", kind="update", shape=(6, 5), rank=2, scale=0.25, reset_every=7,
        base_momentum=momentum,
    )  # fmt: skip
    for name, layers in (("with", (update, dense)), ("without", (dense,))):
        layout = small_round.layout_of(*layers)
        write_weights(tmp_path / name, Weights("ff", 0, layout, zeros_of(layout)))
    header, *rows = [line.split() for line in run("inspect", tmp_path / "with").out.splitlines()[-5:-2]]
    assert header[-5:] == ["scale", "reset", "every", "base", "momentum"]
    assert [row[-3:] for row in rows] == [["0.25", "7", f"{momentum:g}"], ["-", "-", "-"]]
    layer = run("inspect", tmp_path / "with", "--json").json["layers"][0]
    assert (layer["scale"], layer["reset_every"], layer.get("base_momentum", 0.0)) == (0.25, 7, momentum)
    assert "momentum" not in run("inspect", tmp_path / "without").out


def zeros_of(layout: Layout) -> dict[str, NDArray[np.float32]]:
    return {tensor.name: np.zeros(tensor.shape, np.float32) for tensor in weight_tensors(layout)}
