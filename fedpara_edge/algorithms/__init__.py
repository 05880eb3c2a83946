"""Federated optimizers, one a module: the client's half, the server's half, and what each keeps.

`client` and `server` say what the halves are. Each algorithm is a frozen dataclass of its options and a few lines of
mathematics; the files, the streaming of updates and the engines know none of them. One that is added to `CLIENT` or
`SERVER` is known to the commands, the plans and the tests.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedpara_edge.algorithms.client import ClientAlgorithm
from fedpara_edge.algorithms.server import ServerAlgorithm, Weighting
from fedpara_edge.errors import InputError
from fedpara_edge.options import choose
from fedpara_edge.registry import Registry

CLIENT: Mapping[str, type[ClientAlgorithm]] = Registry(
    __name__,
    {
        "fedavg": "fedavg:FedAvgClient",
        "fedprox": "fedprox:FedProx",
        "scaffold": "scaffold:ScaffoldClient",
        "feddyn": "feddyn:FedDynClient",
    },
)
"""Client algorithms by name."""
SERVER: Mapping[str, type[ServerAlgorithm]] = Registry(
    __name__,
    {
        "fedavg": "fedavg:FedAvgServer",
        "fedavgm": "fedavgm:FedAvgM",
        "fedadam": "adaptive:FedAdam",
        "fedyogi": "adaptive:FedYogi",
        "fedadagrad": "adaptive:FedAdagrad",
        "scaffold": "scaffold:ScaffoldServer",
        "feddyn": "feddyn:FedDynServer",
    },
)
"""Server algorithms by name."""

__all__ = [
    "CLIENT",
    "SERVER",
    "ClientAlgorithm",
    "ServerAlgorithm",
    "Weighting",
    "check_halves",
    "find_client",
    "find_server",
]


def find_client(text: str) -> ClientAlgorithm:
    """The client algorithm that a user asks for.

    Args:
        text: Name, a key of `CLIENT`, and options after a colon.

    Raises:
        InputError: There is none of that name, or an option is unknown or out of its range.

    >>> find_client("fedprox:mu=0.3")
    FedProx(mu=0.3)
    """
    algorithm: ClientAlgorithm = choose(CLIENT, text, key="algorithm")
    return algorithm


def find_server(text: str, *, clients: int | None = None) -> ServerAlgorithm:
    """The server algorithm that a user asks for.

    Args:
        text: Name, a key of `SERVER`, and options after a colon.
        clients: Number of all clients, for an algorithm that needs it; None for what the text says.

    Raises:
        InputError: There is none of that name, or an option is unknown, missing or out of its range.

    >>> find_server("scaffold:lr=0.5", clients=10)
    ScaffoldServer(clients=10, lr=0.5)
    """
    given = {} if clients is None else {"clients": clients}
    algorithm: ServerAlgorithm = choose(SERVER, text, key="algorithm", given=given)
    return algorithm


def check_halves(client: ClientAlgorithm, server: ServerAlgorithm) -> None:
    """Refuse the halves of different algorithms, where a half needs its other one.

    Raises:
        InputError: They don't go together.
    """
    local, central = client.name, server.name
    own = [name for name, kind in CLIENT.items() if kind.paired]
    if local != central and {local, central} & set(own):
        one = local if local in own else central
        raise InputError(
            f"expected {one} with the server's algorithm {one} and only then, found {local} with {central}"
        )
    if local == "feddyn":
        alpha, expected = client.to_json()["alpha"], server.options()["alpha"]
        if alpha != expected:
            raise InputError(f"expected the alpha of the server's algorithm, {expected}, found {alpha}")
