"""From one data file to the clients of a simulated federation, each with its own training and test examples.

    rows of the file --split--> rows of each client --max_examples--> fewer rows --test_share--> training | test

Everything is decided by the plan's [data] table and the seed alone, so that all arms of a plan see the same clients,
and what a client holds out does not depend on which others there are. Rows keep the order of the file.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from device_runtime.labels import renumbered
from device_runtime.sources import NAMES, Reading
from fedpara_edge.errors import InputError, counted
from fedpara_edge.options import declared, option
from fedpara_edge.simulation.data.columns import Columns, Examples, Keys, open_columns, open_keys
from fedpara_edge.simulation.data.holdout import fewest_rows, hold_out
from fedpara_edge.simulation.data.partition import by_key, dirichlet, iid, shards
from fedpara_edge.storage.atomic import replacing_folder

__all__ = ["ClientData", "DataPlan", "Examples", "Federation", "load_federation", "write_federation"]

Split = Literal["iid", "dirichlet", "shards", "key"]
Rows = NDArray[np.intp]

NAME_CHARACTERS = 60
PAIR = "the names of two arrays, such as x and y"


@dataclass(frozen=True, kw_only=True)
class DataPlan(Reading):
    """The [data] table of a plan; those of its options that are not here tell how a source is read.

    Args:
        path: Source of the examples (`device_runtime.sources`), `.npz` file, or folder of `.npy` files; a relative one
            counts from the working folder.
        split: Way to deal the rows to clients.
        clients: Number of clients, for iid, dirichlet and shards.
        alpha: Concentration, for dirichlet.
        shards: Pieces of each client, for shards.
        key: Name of the array that holds the owner of each row, for key.
        min_examples: Fewest training examples of a client. Smaller ones are left out with split key, refused otherwise.
        test_share: Share of each client's rows that is held out for its own test, at least one row; 0 for none.
        group: Name of an array; rows of a client with an equal value there stay on one side of that division.
        train: Names of the arrays with inputs and labels.
        further: Names of further arrays with a row for each example, for models of several inputs or outputs. All
            arrays then keep their names in the clients' files, where they are x and y otherwise.
        test: Names of the arrays with a common test set, if there is one.
        max_clients: Number of clients to keep, drawn at random.
        max_examples: Rows of each client to keep, training and test together, drawn at random.

    Raises:
        InputError: A value is out of range, missing, or without effect; the error has its key.
    """

    path: Path = option(
        help="An .npz file, a folder of .npy files, a folder of images or sounds by class, or a .csv or .parquet table."
    )
    split: Split = option(
        "iid",
        was=("by",),
        help="How rows are dealt: evenly, classes unevenly, sorted by class in pieces, or each to its owner.",
    )
    clients: int | None = option(
        None, minimum=1, only=("split", ("iid", "dirichlet", "shards")), help="Number of clients."
    )
    alpha: float | None = option(
        None,
        above=0,
        only=("split", ("dirichlet",)),
        help="Concentration: the smaller, the fewer classes a client has.",
    )
    shards: int | None = option(None, minimum=1, only=("split", ("shards",)), help="Pieces of each client.")
    key: str | None = option(
        None,
        only=("split", ("key",)),
        metavar="ARRAY",
        words="the name of an array",
        help="Array with the owner of each row.",
    )
    min_examples: int = option(1, minimum=1, was=("least",), help="Fewest training examples of a client.")
    test_share: float = option(0.0, minimum=0, below=1, help="Share of each client's rows that is held out.")
    group: str | None = option(
        None,
        metavar="ARRAY",
        words="the name of an array",
        help="Array; rows of a client with an equal value there are held out together.",
    )
    train: tuple[str, str] = option(("x", "y"), metavar="X,Y", words=PAIR, help="Arrays with inputs and labels.")
    further: tuple[str, ...] = option(
        (), metavar="ARRAY", help="Further array of each row, for several inputs or outputs; all then keep their names."
    )
    test: tuple[str, str] | None = option(None, metavar="X,Y", words=PAIR, help="Arrays with a common test set.")
    max_clients: int | None = option(None, minimum=1, help="Number of clients to keep, drawn at random.")
    max_examples: int | None = option(None, minimum=1, help="Rows of each client to keep, drawn at random.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, each in declared(DataPlan).items():
            only = each.option.only
            if only is not None and self.split in only[1] and getattr(self, name) is None:
                raise InputError(f"expected {each.expected}, as split is {self.split!r}, found none", key=name)
        for name in ("key", "group", "train", "test"):
            value = getattr(self, name)
            if value == "" or (isinstance(value, tuple) and "" in value):
                raise declared(DataPlan)[name].refuse(value)
        if self.further and self.test is not None:
            raise InputError("expected without test, found both; hold out a test_share instead", key="further")
        if self.group is not None and self.test_share == 0:
            raise InputError(f"expected with a test_share above 0, found {self.group!r} without", key="group")
        needed = fewest_rows(self.min_examples, self.test_share)
        if self.max_examples is not None and self.max_examples < needed:
            raise InputError(
                f"expected at least {needed}, which leave {self.min_examples} to train on with test_share "
                f"{self.test_share}, found {self.max_examples}",
                key="max_examples",
            )

    @property
    def reading(self) -> Reading:
        """Options for reading a source."""
        return Reading(**{name: getattr(self, name) for name in declared(Reading)})


@dataclass(frozen=True, eq=False)
class ClientData:
    """The examples of one client.

    Args:
        name: Name of the client, good for a file and in an update; no two differ in upper and lower case only.
        train: Examples to train on.
        test: Examples held out for its own test; None without test_share.
    """

    name: str
    train: Examples
    test: Examples | None


@dataclass(frozen=True, eq=False)
class Federation:
    """All clients, and the common test set if there is one.

    Args:
        clients: The clients.
        test: Common test set; None if there is none.
        left_out: Names of the owners with too few examples, with split key.
        class_names: Names of the classes in the order of their numbers, strings [C]; None if they have none.
    """

    clients: tuple[ClientData, ...]
    test: Examples | None
    left_out: tuple[str, ...] = ()
    class_names: NDArray[Any] | None = None

    @property
    def shared(self) -> dict[str, NDArray[Any]]:
        """Arrays that stand in the file of every client beside its examples."""
        return {} if self.class_names is None else {NAMES: self.class_names}


def load_federation(data: DataPlan, seed: int) -> Federation:
    """Read the data file and deal it out.

    Args:
        data: The [data] table of a plan.
        seed: Seed from 0 on, which decides the result together with `data`.

    Raises:
        InputError: A file or array is missing or does not fit, a client has too few examples, or no client is left.
    """
    if seed < 0:
        raise InputError(f"seed: expected a number from 0 on, found {seed}")
    if not data.path.exists():
        raise InputError(
            f"data.path: expected an .npz file or a folder, or a table, found nothing at {data.path}; check the "
            "path (a plan's relative paths count from its own folder, so a copy in a run folder needs others), or "
            "make the file first (plans/data/ has a script for the data of each ready plan)"
        )
    columns = open_columns(data.path, data.train, option="data.train", further=data.further, reading=data.reading)
    groups = None
    if data.group is not None:
        groups = open_keys(data.path, data.group, option="data.group", of=columns, reading=data.reading)
    test = None if data.test is None else _common_test(data, columns)
    divided = {name: _divide(name, rows, groups, data, seed) for name, rows in _deal(data, columns, seed).items()}
    small = [name for name, (training, _) in divided.items() if len(training) < data.min_examples]
    if small and data.split != "key":
        _refuse(data, small[0], *divided[small[0]])
    enough = [name for name in divided if name not in set(small)]
    if not enough:
        largest = max(divided, key=lambda name: len(divided[name][0]))
        _refuse(data, largest, *divided[largest])
    clients = []
    for name in _draw(enough, data.max_clients, seed):
        training, held = divided[name]
        clients.append(ClientData(name, columns.take(training), columns.take(held) if data.test_share else None))
    return Federation(tuple(clients), test, tuple(small), columns.classes_by_name)


def write_federation(federation: Federation, folder: Path) -> None:
    """Write a folder with train/<client>.npz, test/<client>.npz of what is held out, and test.npz of the common test.

    Each file has the arrays as the devices' commands take them, x and y unless there are further ones, and `y_names` if
    the classes have names.

    Raises:
        FedparaError: The disk is full or refuses the write.
    """
    with replacing_folder(folder) as making:
        for client in federation.clients:
            _save(making / "train" / f"{client.name}.npz", client.train, federation.shared)
            _save(making / "test" / f"{client.name}.npz", client.test, federation.shared)
        _save(making / "test.npz", federation.test, federation.shared)


def _save(path: Path, examples: Examples | None, shared: Mapping[str, NDArray[Any]]) -> None:
    if examples is not None:
        path.parent.mkdir(exist_ok=True)
        arrays: dict[str, Any] = {**examples.arrays, **shared}
        np.savez(path, **arrays)


def _deal(data: DataPlan, columns: Columns, seed: int) -> dict[str, Rows]:
    """Rows of each client by its name."""
    if data.split == "key":
        assert data.key is not None
        found = by_key(open_keys(data.path, data.key, option="data.key", of=columns, reading=data.reading))
        return dict(zip(_names(list(found)), found.values(), strict=True))
    assert data.clients is not None
    clients, classes = data.clients, None if data.split == "iid" else columns.classes(data.split)
    try:
        if classes is None:
            rows = iid(len(columns), clients=clients, seed=seed)
        elif data.split == "shards":
            assert data.shards is not None
            rows = shards(classes, clients=clients, shards=data.shards, seed=seed)
        else:
            assert data.alpha is not None
            fewest = fewest_rows(data.min_examples, data.test_share)
            rows = dirichlet(classes, clients=clients, alpha=data.alpha, seed=seed, min_examples=fewest)
    except InputError as error:
        raise InputError(f"{data.path}: {error}") from error
    width = len(str(clients - 1))
    return {f"client-{number:0{width}}": mine for number, mine in enumerate(rows)}


def _divide(name: str, rows: Rows, groups: Keys | None, data: DataPlan, seed: int) -> tuple[Rows, Rows]:
    """Rows to train on and rows to test on, ascending; none to train on where both can't be had."""
    generator = np.random.default_rng([seed, zlib.crc32(name.encode(errors="surrogatepass"))])
    if data.max_examples is not None and len(rows) > data.max_examples:
        rows = np.sort(generator.choice(rows, data.max_examples, replace=False))
    if not data.test_share:
        return rows, rows[:0]
    units = np.arange(len(rows)) if groups is None else np.unique(groups[rows], return_inverse=True)[1]
    held = hold_out(np.bincount(units), data.test_share, generator)[units]
    return rows[~held], rows[held]


def _common_test(data: DataPlan, columns: Columns) -> Examples:
    assert data.test is not None
    held = open_columns(data.path, data.test, option="data.test", reading=data.reading)
    for which, (of_test, of_training) in enumerate(((held.x, columns.x), (held.y, columns.y))):
        if of_test.shape[1:] != of_training.shape[1:]:
            raise InputError(
                f"{data.path}: array {data.test[which]!r}: expected rows like those of {data.train[which]!r}, "
                f"{list(of_training.shape[1:])}, found {list(of_test.shape[1:])}; name the arrays that belong together"
            )
    if held.classes_by_name is not None and columns.classes_by_name is not None:
        names, known = held.classes_by_name.tolist(), columns.classes_by_name.tolist()
        held = replace(held, y=renumbered(data.path, held.y, names, known))
    return held.take(np.arange(len(held)))


def _draw(names: list[str], most: int | None, seed: int) -> list[str]:
    if most is None or len(names) <= most:
        return names
    chosen = np.random.default_rng([seed, 1]).choice(len(names), most, replace=False)
    return [names[number] for number in np.sort(chosen)]


def _names(owners: list[Any]) -> list[str]:
    """Names for owners, the same but for characters that files can't have and for those that would coincide.

    >>> _names(["Hamlet/KING", "Hamlet/King", 7])
    ['Hamlet-KING', 'Hamlet-King-2', '7']
    """
    names: dict[str, str] = {}
    for owner in owners:
        text = owner.decode(errors="replace") if isinstance(owner, bytes) else str(owner)
        stem = re.sub(r"[^\w.-]+", "-", text).strip("-.")[:NAME_CHARACTERS] or "client"
        name, number = stem, 1
        while name.casefold() in names:
            number += 1
            name = f"{stem}-{number}"
        names[name.casefold()] = name
    return list(names.values())


def _refuse(data: DataPlan, client: str, training: Rows, held: Rows) -> NoReturn:
    which, remedy = "client", "fewer clients or a smaller data.min_examples or data.test_share"
    if data.split == "key":
        which, remedy = "the largest client,", "a smaller data.min_examples or data.test_share"
    found = f"{len(training)} with {len(held)} held out" if data.test_share else f"{len(training)}"
    if data.group is not None and not len(training):
        found += f", as {data.group!r} has one value there"
    raise InputError(
        f"{data.path}: {which} {client!r}: expected at least {counted(data.min_examples, 'example')} to train on, "
        f"found {found}; "
        f"take {remedy}"
    )
