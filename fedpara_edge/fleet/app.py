"""The Flower app of a fleet: a folder that `flwr run` takes as it is.

    pyproject.toml               names of the apps, and the settings (`settings.FleetConfig`)
    fedpara_rounds/              the ServerApp and the ClientApp, which are this project's
    LICENSE, README.md           as Flower and its users expect
    run/                         what the server needs to go on, and the metrics; made by the first round
    local/                       what `fedpara-edge fleet up` needs: logs, keys, and the state of nodes on this machine

Flower copies the small part of it to every node. What is in run/ and local/ stays.
"""

from __future__ import annotations

from pathlib import Path

from fedpara_edge._version import __version__
from fedpara_edge.errors import InputError, OutputExistsError
from fedpara_edge.fleet.federation import check_fit
from fedpara_edge.fleet.settings import FleetConfig, from_flower, to_flower
from fedpara_edge.formats.bundle import open_bundle
from fedpara_edge.simulation.plan.plan import Arm, Plan, read_plan
from fedpara_edge.storage.atomic import check_output, replacing_folder
from fedpara_edge.storage.tomlfile import read_toml, toml_text

PACKAGE = "fedpara_rounds"
FLOWER = "1.42.0"
"""The release of Flower that apps are written for."""
RUN, LOCAL = "run", "local"

_PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedpara-rounds"
version = "{version}"
description = "Rounds of fedpara-edge on Flower"
license = {{ file = "LICENSE" }}
dependencies = ["flwr>={flower},<2", "fedpara-edge[fleet]"]

[tool.flwr.app]
publisher = "fedparaedge"
fab-format-version = 1
flwr-version-target = "{flower}"
fab-include = ["{package}/*.py", "LICENSE", "README.md"]

[tool.flwr.app.components]
serverapp = "{package}.server:app"
clientapp = "{package}.client:app"

# What `flwr run --run-config` can change; see `fedpara-edge fleet init --help`.
[tool.flwr.app.config]
{config}
"""
_README = """\
# {name} on Flower

On this machine, with nodes for the clients of the plan's data or for data files of your own:

    fedpara-edge fleet up . -n 2

With nodes elsewhere: a SuperLink here, a SuperNode on each device, and then the rounds.

    flower-superlink --insecure --host 0.0.0.0 --disable-runtime-dependency-installation
    flower-supernode --insecure --superlink ADDRESS:8000 --node-config 'data="data.npz" state="state"'
    flwr run . NAME --stream

NAME is the connection to the SuperLink in Flower's `config.toml`. Whether the rounds succeeded is in `flwr list NAME`;
the exit code of `flwr run` does not tell. The same command goes on after the last round that was done. Metrics and
weights are in `run/`, and `fedpara-edge report run` makes a page of them.
"""


def find_arm(plan: Plan, name: str | None) -> Arm:
    """The arm of a name, or the only one of a plan.

    Raises:
        InputError: There is none, or there are several and no name.
    """
    if name is not None:
        return plan.arm(name)
    if len(plan.arms) > 1:
        raise InputError(f"expected one of {', '.join(arm.name for arm in plan.arms)}, found none", key="arm")
    return plan.arms[0]


def write_app(output: Path, config: FleetConfig) -> None:
    """Write the Flower app of a fleet.

    Args:
        output: Folder to make.
        config: Settings, with absolute paths.

    Raises:
        InputError: The plan and the bundle do not go together, or the folder can't be made.
        OutputExistsError: The folder exists.
        WrongBundleError: The bundle is damaged.
        FedparaError: The disk refuses a write.
    """
    plan = read_plan(config.plan)
    check_fit(plan.arm(config.arm), open_bundle(config.bundle))
    check_output(output, overwrite=True, folder=True)
    if output.exists():
        raise OutputExistsError(
            f"{output}: expected a new folder, found an existing one; choose another name, or change its pyproject.toml"
        )
    lines = toml_text(to_flower(config)).rstrip("\n")
    project = _PROJECT.format(package=PACKAGE, version=__version__, flower=FLOWER, config=lines)
    with replacing_folder(output) as made:
        (made / PACKAGE).mkdir()
        (made / "pyproject.toml").write_text(project, encoding="utf-8")
        (made / "README.md").write_text(_README.format(name=plan.name), encoding="utf-8")
        (made / "LICENSE").write_text("This app is yours; so is the choice of its license.\n", encoding="utf-8")
        (made / PACKAGE / "__init__.py").write_text('"""Rounds of fedpara-edge on Flower."""\n', encoding="utf-8")
        for name, kind in (("server", "ServerApp"), ("client", "ClientApp")):
            text = f'"""The {kind}."""\n\nfrom fedpara_edge.fleet import {name}\n\napp = {name}.app\n'
            (made / PACKAGE / f"{name}.py").write_text(text, encoding="utf-8")


def read_app(folder: Path) -> FleetConfig:
    """Settings of a Flower app that `write_app` wrote.

    Raises:
        InputError: The folder is something else, or a setting does not fit.
    """
    path = folder / "pyproject.toml"
    try:
        table = read_toml(path)["tool"]["flwr"]["app"]["config"]
        if not isinstance(table, dict):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder}: expected a Flower app of fedpara-edge, found none; make it: fedpara-edge fleet init"
        ) from error
    try:
        return from_flower(FleetConfig, table)
    except InputError as error:
        raise InputError(f"{path}: tool.flwr.app.config: {error}") from error
