"""Names of tensors in a file matched to those of a model, which may be wrapped otherwise.

Training wraps models: DistributedDataParallel puts `module.` before every name, `torch.compile` `_orig_mod.`, Lightning
the attribute that holds the model, mostly `model.`. The model itself may be a wrapper of what the file holds. So one
prefix may be left out on either side, the one with which most names match.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

WRAPPERS = frozenset(("_orig_mod", "module"))
"""Parts of names that wrappers of modules insert, wherever they occur."""


class Prefixes(NamedTuple):
    """Prefix that the names in a file have and those of the model lack, and the reverse; with the dot, or empty."""

    file: str = ""
    model: str = ""


def match_names(found: Iterable[str], wanted: Iterable[str]) -> tuple[dict[str, str], Prefixes]:
    """Match the names in a file to those of a model.

    Args:
        found: Names in the file.
        wanted: Names of the model.

    Returns:
        Names in the file by those of the model, and the prefixes that were left out, apart from `WRAPPERS`.

    >>> match_names(["module.net.0.weight", "module.loss.weight"], ["0.weight"])
    ({'0.weight': 'module.net.0.weight'}, Prefixes(file='net.', model=''))
    """
    there, here = _bare(found), _bare(wanted)
    prefixes = _most_common(there, here)
    pairs = {
        here[name]: there[source]
        for source in there
        if source.startswith(prefixes.file) and (name := prefixes.model + source.removeprefix(prefixes.file)) in here
    }
    return {name: pairs[name] for name in here.values() if name in pairs}, prefixes


def _bare(names: Iterable[str]) -> dict[str, str]:
    """Names by what they are without the wrappers; as they are where two would be alike."""
    names = list(names)
    bare = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in names}
    counts = Counter(bare.values())
    return {bare[name] if counts[bare[name]] == 1 else name: name for name in names}


def _most_common(there: Mapping[str, str], here: Mapping[str, str]) -> Prefixes:
    """Prefixes with which most names match; the shortest of several."""
    votes = Counter[Prefixes]({Prefixes(): 0})
    votes.update(Prefixes(file=prefix) for name in there for prefix, rest in _splits(name) if rest in here)
    votes.update(Prefixes(model=prefix) for name in here for prefix, rest in _splits(name) if prefix and rest in there)
    return max(votes, key=lambda prefixes: (votes[prefixes], -len(prefixes.file + prefixes.model)))


def _splits(name: str) -> Iterator[tuple[str, str]]:
    parts = name.split(".")
    for count in range(len(parts)):
        yield "".join(f"{part}." for part in parts[:count]), ".".join(parts[count:])
