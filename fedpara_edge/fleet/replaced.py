"""Parts of Flower that are replaced in a fork, so that its programs wait for bells (`bells`) and fork for their tasks.

They are replaced by name in Flower's modules. A release of Flower that lacks one of them is refused.
"""

from __future__ import annotations

import importlib
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from types import SimpleNamespace
from typing import Any

from fedpara_edge.errors import FedparaError
from fedpara_edge.fleet.app import FLOWER
from fedpara_edge.fleet.bells import Place

REMOTE_SECONDS = 0.8
"""Time in which an idle SuperNode asks a SuperLink elsewhere for messages, in place of Flower's 3 s."""
LATE_SECONDS = 3.0
"""Time in which a program asks that is told by a bell."""
BACKOFF_SECONDS = 0.1
"""Time after which a task first looks again for a message that is still to come, in place of Flower's 1 s."""
_SUPERNODE = "flwr.supernode.start_client_internal"
_SUPEREXEC = "flwr.supercore.superexec.run_superexec"
_EXECUTOR = "flwr.supercore.superexec.executor.subprocess_executor"
_OBJECTS = "flwr.supercore.inflatable.inflatable_utils"


def check_flower() -> None:
    """Refuse a release of Flower that lacks what is replaced, and have its tasks wait less for what is still to come.

    Raises:
        FedparaError: A part is missing.
    """
    for module, names in (
        (_SUPERNODE, ("time", "_pull_and_store_message", "_push_messages")),
        (_SUPEREXEC, ("time",)),
        (_EXECUTOR, ("subprocess",)),
    ):
        for name in names:
            _of_flower(module, name)
    pull = _of_flower(_OBJECTS, "pull_objects").pull_objects
    if "initial_backoff" not in (pull.__kwdefaults__ or {}):
        raise _other_flower("an option initial_backoff of pull_objects")
    pull.__kwdefaults__ = {**pull.__kwdefaults__, "initial_backoff": BACKOFF_SECONDS}


def ring_in_supernode(place: Place) -> None:
    """Have this process, a SuperNode, wait for its bell, and ring for what it has."""
    module = _of_flower(_SUPERNODE, "time")
    pull, push = module._pull_and_store_message, module._push_messages
    most = LATE_SECONDS if place.is_told else REMOTE_SECONDS

    def pull_and_ring(**arguments: Any) -> Any:
        place.bells.is_node(place.number, arguments["state"].get_node_id())
        found = pull(**arguments)
        if found is not None:
            place.tasks.ring()
        return found

    def push_and_ring(**arguments: Any) -> None:
        push(**arguments)
        place.bells.server.ring()

    module._pull_and_store_message, module._push_messages = pull_and_ring, push_and_ring
    module.time = _time(lambda seconds: place.node.wait(min(seconds, most)))


def wait_in_superexec(place: Place) -> None:
    """Have this process, a SuperExec, wait for its bell."""
    _of_flower(_SUPEREXEC, "time").time = _time(lambda _: place.tasks.wait(LATE_SECONDS))


def replace_popen(popen: Callable[[Sequence[str]], None]) -> None:
    """Have this process, a SuperExec, call a function where it would start a new Python for a task."""

    def start(arguments: Sequence[str], **_: Any) -> None:
        popen(arguments)

    _of_flower(_EXECUTOR, "subprocess").subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": start})


def _time(sleep: Callable[[float], None]) -> SimpleNamespace:
    """The module `time` with another sleep."""
    return SimpleNamespace(**{**vars(time), "sleep": sleep})


def _of_flower(module: str, name: str) -> Any:
    """A module of Flower that has a name which is replaced in it.

    Raises:
        FedparaError: This release of Flower has none.
    """
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise _other_flower(f"a module {module}") from error
    if not hasattr(found, name):
        raise _other_flower(f"{name} in {module}")
    return found


def _other_flower(expected: str) -> FedparaError:
    return FedparaError(
        f"flwr {metadata.version('flwr')}: expected {expected}, as in {FLOWER}, found none; install that release "
        f"(pip install flwr=={FLOWER}), or use Flower's own commands, which start more processes"
    )
