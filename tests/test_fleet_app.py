"""The app of a fleet: its settings, what is refused, and the Flower that it needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from command_line import Bad, Command, check_refused, succeed
from fleet_grid import EXPORT
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate
from tiny_plan import write_plan

from fedpara_edge.errors import FedparaError, InputError
from fedpara_edge.fleet import replaced
from fedpara_edge.fleet.app import read_app
from fedpara_edge.fleet.settings import FleetConfig, NodeConfig, from_flower, to_flower


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    succeed(place, EXPORT.split())
    return place / "bundle"


def test_settings_survive_flower(tmp_path: Path) -> None:
    config = FleetConfig(bundle=tmp_path, plan=tmp_path / "p", run=tmp_path / "r", arm="a", round_seconds=5)
    assert from_flower(FleetConfig, to_flower(config)) == config
    node = from_flower(NodeConfig, {"data": "d", "state": "s", "image-size": "", "label-column": "y", "threads": 2})
    assert (node.data, node.threads, node.reading.label_column) == (Path("d"), 2, ("y",))
    whole = NodeConfig(data=tmp_path, state=tmp_path, column=("a", "b"), image_size=None, threads=2)
    assert from_flower(NodeConfig, to_flower(whole)) == whole
    with pytest.raises(InputError, match="dta: expected a key of this table, found an unknown one; did you mean data"):
        from_flower(NodeConfig, {"dta": "d", "state": "s"})


def init(plan: str = "plan.toml", *more: str) -> list[str]:
    return ["fleet", "init", "bundle", "--plan", plan, "--arm", "small", "-o", "app", *more]


def here_with(bundle: Path) -> Callable[[Path], None]:
    def prepare(place: Path) -> None:
        write_plan(place)
        (place / "bundle").symlink_to(bundle)

    return prepare


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's own
def test_the_app_is_one_that_flower_takes(
    tmp_path: Path, bundle: Path, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here_with(bundle)(tmp_path)
    assert run(*init(), "--nodes", "5").code == 0
    config, warnings = load_and_validate(Path("app") / "pyproject.toml")
    assert warnings == []
    assert config["project"]["name"] == "fedpara-rounds"
    before = build_fab_from_disk(tmp_path / "app")
    (tmp_path / "app" / "run").mkdir()
    (tmp_path / "app" / "run" / "notes.md").write_text("a run")
    assert build_fab_from_disk(tmp_path / "app") == before
    found = read_app(tmp_path / "app")
    assert (found.nodes, found.arm, found.plan, found.run) == (
        5,
        "small",
        tmp_path / "plan.toml",
        tmp_path / "app" / "run",
    )


BAD: dict[str, tuple[Sequence[str], int, str]] = {
    "kind": ([*init(), "--arm", "dense"], 2, "expected model.kind dense, as in arm dense, found fedpara"),
    "local": ([*init(), "--arm", "alone"], 2, "arm alone: expected one with a server"),
    "arm": ([*init()[:4], "plan.toml", "-o", "app"], 2, "--arm: expected one of dense, small, alone, found none"),
    "plan": (init("nothing.toml"), 2, "nothing.toml: expected a plan"),
    "app": (["fleet", "up", "bundle"], 2, "bundle: expected a Flower app of fedpara-edge, found none"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(
    name: str, bundle: Path, tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here_with(bundle)(tmp_path)
    bad: Bad = (None, *BAD[name])
    check_refused(run, tmp_path, bad)


def test_a_flower_in_which_a_replaced_part_is_gone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supercore.inflatable import inflatable_utils
    from flwr.supernode import start_client_internal

    monkeypatch.setattr(inflatable_utils, "pull_objects", lambda: None)
    with pytest.raises(FedparaError, match=r"flwr .*: expected an option initial_backoff of pull_objects, as in 1\.42"):
        replaced.check_flower()
    monkeypatch.delattr(start_client_internal, "_push_messages")
    with pytest.raises(FedparaError, match=r"expected _push_messages in flwr\.supernode.*pip install flwr==1\.42"):
        replaced.check_flower()
    with pytest.raises(FedparaError, match=r"expected a module flwr\.gone"):
        replaced._of_flower("flwr.gone", "time")
