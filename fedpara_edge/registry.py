"""What can be chosen by name, of which a module is imported when something of it is looked up: `Registry`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import Any, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class Registry(MutableMapping[Key, Value]):
    """Mapping of what the modules of a room define, of which a module is imported when something of it is looked up.

    A command that takes one codec and one algorithm need not spend the time of importing all of them.

    Args:
        room: Name of the package.
        places: Module in the package and name in the module, `fedprox:FedProx`, by key.
        made: Function that makes the value of what is found and the key; None for what is found itself.

    >>> registry = Registry("fedpara_edge.algorithms", {"fedprox": "fedprox:FedProx"})
    >>> [*registry], registry["fedprox"].name
    (['fedprox'], 'fedprox')
    """

    def __init__(self, room: str, places: Mapping[Key, str], made: Callable[[Any, Key], Value] | None = None) -> None:
        self._room, self._places, self._made = room, dict(places), made
        self._found: dict[Key, Value] = {}

    def __getitem__(self, key: Key) -> Value:
        if key not in self._found:
            module, _, name = self._places[key].partition(":")
            found = getattr(import_module(f"{self._room}.{module}"), name)
            self._found[key] = found if self._made is None else self._made(found, key)
        return self._found[key]

    def __setitem__(self, key: Key, value: Value) -> None:
        self._places[key], self._found[key] = "", value

    def __delitem__(self, key: Key) -> None:
        del self._places[key]
        self._found.pop(key, None)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[Key]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
