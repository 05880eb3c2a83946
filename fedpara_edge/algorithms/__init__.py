"""Federated optimization: what devices do to their gradients (`local`) and the server to their mean (`server`).

Each algorithm is a frozen dataclass of its options and a few lines of mathematics; the files, the streaming of updates
and the engines know none of them. FedProx has nothing to do on the server: its devices go with `fedavg` or any other
server algorithm but `scaffold` and `feddyn`, which need their own kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedpara_edge.algorithms import adaptive, local, server
from fedpara_edge.algorithms.local import LocalAlgorithm
from fedpara_edge.algorithms.options import make
from fedpara_edge.algorithms.server import ServerAlgorithm, Weighting

LOCAL: Mapping[str, type[LocalAlgorithm]] = {
    kind.name: kind for kind in (local.FedAvg, local.FedProx, local.Scaffold, local.FedDyn)
}
SERVER: Mapping[str, type[ServerAlgorithm]] = {
    kind.name: kind
    for kind in (
        server.FedAvg,
        server.FedAvgM,
        adaptive.FedAdam,
        adaptive.FedYogi,
        adaptive.FedAdagrad,
        server.Scaffold,
        server.FedDyn,
    )
}

__all__ = ["LOCAL", "SERVER", "LocalAlgorithm", "ServerAlgorithm", "Weighting", "find_local", "find_server"]


def find_local(name: str, options: Mapping[str, Any] | None = None) -> LocalAlgorithm:
    """The local algorithm of that name.

    Args:
        name: a key of `LOCAL`.
        options: `mu` or `alpha`, as the algorithm has them; None for one that was not given.

    Raises:
        InputError: there is none of that name or without those options, or a value is out of range.
    """
    return make(LOCAL, name, options or {})


def find_server(name: str, options: Mapping[str, Any] | None = None) -> ServerAlgorithm:
    """The server algorithm of that name.

    Args:
        name: a key of `SERVER`.
        options: `lr`, `momentum`, `beta1`, `beta2`, `tau`, `alpha` or `clients`, as the algorithm has them; None for
            one that was not given.

    Raises:
        InputError: there is none of that name or without those options, it needs one more, or a value is out of range.
    """
    return make(SERVER, name, options or {})
