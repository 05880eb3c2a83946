"""A command that starts imports what it uses, and nothing else that takes long."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import small_round

from fedpara_edge.formats.weights import read_weights

SLOW = ("numpy.ma", "numpy.random", "statistics", "tomllib", "zstandard")
"""Modules that take milliseconds each."""


def loaded(folder: Path, *arguments: str) -> set[str]:
    """Modules that a command has imported when it ends well."""
    code = (
        "import sys\nfrom fedpara_edge.cli import fedpara_edge\n"
        "fedpara_edge.main(sys.argv[1:], standalone_mode=False)\n"
        "print(*sys.modules, sep='\\n', file=open('loaded', 'w'))"
    )
    subprocess.run([sys.executable, "-c", code, *arguments], cwd=folder, check=True, capture_output=True)
    return set((folder / "loaded").read_text().splitlines())


def chosen_from(room: str, *names: str) -> set[str]:
    """Modules of a room that are chosen by name, each of which is there."""
    modules = {f"fedpara_edge.{room}.{name}" for name in names}
    assert all(find_spec(module) for module in modules)
    return modules


def test_help_needs_no_numpy(tmp_path: Path) -> None:
    assert not {"numpy", *SLOW} & loaded(tmp_path, "--help")


def test_aggregate(tmp_path: Path) -> None:
    weights = small_round.start_round(tmp_path)
    small_round.send(tmp_path, weights, "a")
    found = loaded(tmp_path, "aggregate", "a.update", "--weights", "base.safetensors", "-o", "next")
    assert read_weights(tmp_path / "next").round == weights.round + 1
    assert not {*SLOW, "fedpara_edge.trust", "fedpara_edge.simulation"} & found
    assert not chosen_from("codecs", "uniform", "integers", "topk", "rotated") & found
    assert not chosen_from("algorithms", "adaptive", "fedprox", "feddyn", "scaffold") & found
    assert not chosen_from("aggregation.rules", "krum", "coordinates", "mixing", "geometry") & found
    assert not {"fedpara_edge.losses", "fedpara_edge.formats.partial", "fedpara_edge.aggregation.exact"} & found


def test_train(here: Path) -> None:
    found = loaded(here, "train", "bundle", "--data", "d.npz", "--state", "s", "-o", "u")
    assert (here / "u").is_file()
    assert not {*SLOW, "torch"} - {"numpy.random"} & found
    assert not chosen_from("metrics", "classes", "binary", "regression") & found
