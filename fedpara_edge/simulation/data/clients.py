"""The clients' rows in files, as each device would have them, and an index of the clients."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.errors import InputError
from fedpara_edge.formats.update import is_valid_client_name
from fedpara_edge.simulation.data.columns import Examples
from fedpara_edge.simulation.data.federation import DataPlan, load_federation
from fedpara_edge.storage.atomic import replacing_folder
from fedpara_edge.storage.wholefile import read_text

INDEX = "clients.json"
COMMON = "common"


@dataclass(frozen=True, kw_only=True)
class Client:
    """A client.

    Args:
        name: Name of the client and of its folder.
        examples: Number of training examples.
        test_examples: Number of examples that it holds out for its own test.
    """

    name: str
    examples: int
    test_examples: int


@dataclass(frozen=True, kw_only=True)
class Clients:
    """All clients of a seed, in a folder of their own.

    Args:
        folder: Folder with `clients/<client>/train`, `clients/<client>/test` and `common`.
        clients: The clients, in the order of the federation.
        test_examples: Number of examples in the common test set; 0 if there is none.
        left_out: Number of owners of too few rows to be clients.
    """

    folder: Path
    clients: tuple[Client, ...]
    test_examples: int
    left_out: int

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all clients."""
        return tuple(client.name for client in self.clients)

    def train(self, client: str) -> Path:
        """Folder with the data that a client trains on."""
        return self.folder / "clients" / client / "train"

    def test(self, client: str) -> Path:
        """Folder with the data that a client holds out."""
        return self.folder / "clients" / client / "test"

    @property
    def common(self) -> Path:
        """Folder with the common test set."""
        return self.folder / COMMON


def write_clients(folder: Path, data: DataPlan, seed: int) -> None:
    """Deal out the data of a seed and write it, all at once.

    Raises:
        InputError: The data does not fit.
        FedparaError: The disk refuses a write.
    """
    federation = load_federation(data, seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(folder) as making:
        clients = []
        for client in federation.clients:
            if not _names_a_file(client.name):
                raise InputError(f"client {client.name!r}: expected a name good for a file, found another; rename it")
            held = client.test if client.test is not None and len(client.test) else None
            _write(making / "clients" / client.name / "train", client.train, federation.shared)
            if held is not None:
                _write(making / "clients" / client.name / "test", held, federation.shared)
            clients.append(
                Client(name=client.name, examples=len(client.train), test_examples=len(held) if held is not None else 0)
            )
        common = federation.test
        if common is not None:
            _write(making / COMMON, common, federation.shared)
        index = {
            "clients": [asdict(client) for client in clients],
            "test_examples": len(common) if common else 0,
            "left_out": len(federation.left_out),
        }
        (making / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def read_clients(folder: Path) -> Clients:
    """The clients that `write_clients` wrote to a folder.

    Raises:
        InputError: The folder holds something else.
    """
    try:
        index = json.loads(read_text(folder / INDEX))
        clients = tuple(Client(**client) for client in index["clients"])
        numbers = [index["test_examples"], index["left_out"]]
        numbers += [number for client in clients for number in (client.examples, client.test_examples)]
        are_counts = all(type(number) is int and number >= 0 for number in numbers)
        if not clients or not are_counts or not all(_names_a_file(client.name) for client in clients):
            raise ValueError("a field that does not fit")
        return Clients(**{**index, "folder": folder, "clients": clients})
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{folder / INDEX}: expected the clients of a run, found a damaged file; run the plan into a new folder"
        ) from error


def _names_a_file(name: Any) -> bool:
    return isinstance(name, str) and is_valid_client_name(name) and name != ".." and Path(name).name == name


def _write(folder: Path, examples: Examples, shared: Mapping[str, NDArray[Any]]) -> None:
    folder.mkdir(parents=True)
    for name, array in {**examples.arrays, **shared}.items():
        np.save(folder / f"{name}.npy", array)
