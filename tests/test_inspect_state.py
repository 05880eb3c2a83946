"""`fedpara-edge inspect` on folders: whose state it is, and rounds in the order of their numbers."""

from pathlib import Path

import numpy as np
import pytest
import small_round
from command_line import Command

from fedpara_edge.algorithms import find_server
from fedpara_edge.factors.layout import Layout
from fedpara_edge.formats.serverstate import state_of, write_server_state
from fedpara_edge.formats.weights import Weights
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
