"""Federated optimizers, one a module: the client's half, the server's half, and what each keeps.

`client` and `server` say what the halves are. Each algorithm is a frozen dataclass of its options and a few lines of
mathematics; the files, the streaming of updates and the engines know none of them. One that is added to `CLIENT` or
`SERVER` is known to the commands, the plans and the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedpara_edge.algorithms.adaptive import FedAdagrad, FedAdam, FedYogi
from fedpara_edge.algorithms.client import ClientAlgorithm
from fedpara_edge.algorithms.fedavg import FedAvgClient, FedAvgServer
from fedpara_edge.algorithms.fedavgm import FedAvgM
from fedpara_edge.algorithms.feddyn import FedDynClient, FedDynServer
from fedpara_edge.algorithms.fedprox import FedProx
from fedpara_edge.algorithms.options import make
from fedpara_edge.algorithms.scaffold import ScaffoldClient, ScaffoldServer
from fedpara_edge.algorithms.server import ServerAlgorithm, Weighting

CLIENT: Mapping[str, type[ClientAlgorithm]] = {
    kind.name: kind for kind in (FedAvgClient, FedProx, ScaffoldClient, FedDynClient)
}
"""Client algorithms by name."""
SERVER: Mapping[str, type[ServerAlgorithm]] = {
    kind.name: kind for kind in (FedAvgServer, FedAvgM, FedAdam, FedYogi, FedAdagrad, ScaffoldServer, FedDynServer)
}
"""Server algorithms by name."""

__all__ = ["CLIENT", "SERVER", "ClientAlgorithm", "ServerAlgorithm", "Weighting", "find_client", "find_server"]


def find_client(name: str, options: Mapping[str, Any] | None = None) -> ClientAlgorithm:
    """The client algorithm of a name.

    Args:
        name: Key of `CLIENT`.
        options: Values of its fields; None where its default is to be taken.

    Raises:
        InputError: The name or an option is unknown, or a value is missing or out of range.

    >>> find_client("fedprox", {"mu": 0.3, "alpha": None})
    FedProx(mu=0.3)
    """
    return make(CLIENT, name, options or {})


def find_server(name: str, options: Mapping[str, Any] | None = None) -> ServerAlgorithm:
    """The server algorithm of a name.

    Args:
        name: Key of `SERVER`.
        options: Values of its fields; None where its default is to be taken.

    Raises:
        InputError: The name or an option is unknown, or a value is missing or out of range.

    >>> find_server("scaffold", {"clients": 10})
    ScaffoldServer(clients=10, lr=1.0)
    """
    return make(SERVER, name, options or {})
