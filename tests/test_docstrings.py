"""Docstrings are read out of context: their sections describe what exists, in phrases that stand alone.

A tooltip, `help` and the API reference show one entry without its neighbors, where "seed: of the run." says nothing. So
an entry begins with a capital letter, a symbol or code, and neither with a preposition nor with a relative clause.
"""

import inspect
import re
from collections.abc import Iterator
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from source_tree import PACKAGES, modules, name_of

PREPOSITIONS = {"of", "for", "to", "with", "within", "without", "in", "into", "on", "from", "by", "as", "than"}
CLAUSES = {"that", "which", "who", "whom", "whose", "how", "what", "where", "when", "why"}
PRONOUNS = {"it", "its", "they", "them", "their", "those", "likewise"}
DANGLING = PREPOSITIONS | CLAUSES | PRONOUNS
"""First words that lean on something said before."""


class Entry(NamedTuple):
    """One entry of a section, `name: text`; several names where they are described together."""

    section: str
    names: tuple[str, ...]
    text: str


def entries(docstring: str) -> Iterator[Entry]:
    section = ""
    for line in inspect.cleandoc(docstring).splitlines():
        if header := re.fullmatch(r"(Args|Attributes|Raises):", line):
            section = header[1]
        elif line and not line.startswith(" "):
            section = ""
        elif section and re.match(r" {4}\S", line):
            names, _, text = line.strip().partition(": ")
            yield Entry(section, tuple(name.lstrip("*") for name in re.split(r",\s*", names)), text)


def fault_of_text(entry: Entry) -> str:
    """What keeps an entry from standing alone; "" if nothing does."""
    (word,) = re.findall(r"^[A-Za-z-]*", entry.text)
    if not entry.text:
        return "is not of the form `name: text`"
    if entry.section != "Raises" and word.lower() in DANGLING:
        return f"begins with {word!r}"
    return "begins with a lowercase letter" if word[:1].islower() else ""


def described(value: Any, section: str) -> set[str]:
    """Names that a section of a definition's docstring may describe."""
    if section == "Args":
        return set(inspect.signature(value).parameters)
    package = value.__module__.partition(".")[0]
    own = [base for base in value.__mro__ if base.__module__.partition(".")[0] == package]
    assigned = re.findall(r"self\.(\w+)", "".join(map(inspect.getsource, own)))
    return {*dir(value), *assigned, *(name for base in own for name in inspect.get_annotations(base))}


def faults(value: Any) -> list[str]:
    """What is wrong with the docstring of a class or a function."""
    found = []
    for entry in entries(value.__doc__ or ""):
        names = set() if entry.section == "Raises" else {*entry.names} - described(value, entry.section)
        wrong = [fault_of_text(entry), *(f"describes {name!r}, which does not exist" for name in sorted(names))]
        found += [f"{entry.section}, {', '.join(entry.names)}: {fault}" for fault in wrong if fault]
    return found


def is_function(value: Any) -> bool:
    return callable(value) and inspect.isfunction(inspect.unwrap(value))


def definitions(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """A module's classes, functions, methods and properties, private ones included, by qualified name."""
    for name, value in vars(module).items():
        if getattr(value, "__module__", "") != module.__name__ or not (inspect.isclass(value) or is_function(value)):
            continue
        yield name, value
        for member, raw in vars(value).items() if inspect.isclass(value) else ():
            match raw:
                case property():
                    method: Any = raw.fget
                case cached_property():
                    method = raw.func
                case staticmethod() | classmethod():
                    method = raw.__func__
                case _:
                    method = raw
            if is_function(method):
                yield f"{name}.{member}", method


EVERY = [path for path in modules(*PACKAGES) if path.name != "__main__.py"]


@pytest.mark.parametrize("path", EVERY, ids=name_of)
def test_docstrings_stand_alone(path: Path) -> None:
    found = [f"{name}: {fault}" for name, value in definitions(import_module(name_of(path))) for fault in faults(value)]
    assert not found, "\n".join(found)


class Sample:
    """A class whose docstring has every fault.

    Args:
        seed: Seed of the run.
        rate: of the run.
        count: How many there are.
        share: part of the whole.
        gone: Number that is no parameter any more.
        size

    Attributes:
        total: Sum of the numbers.
        lost: Name that is no attribute.

    Raises:
        ValueError: the count is negative.
    """

    def __init__(self, seed: int, rate: int, count: int, share: int, size: int) -> None:
        self.total = seed + rate + count + share + size


def test_faults_are_seen() -> None:
    assert faults(Sample) == [
        "Args, rate: begins with 'of'",
        "Args, count: begins with 'How'",
        "Args, share: begins with a lowercase letter",
        "Args, gone: describes 'gone', which does not exist",
        "Args, size: is not of the form `name: text`",
        "Attributes, lost: describes 'lost', which does not exist",
        "Raises, ValueError: begins with a lowercase letter",
    ]


@pytest.mark.parametrize(
    "text", ["Seed of the run.", "`fedpara` or `dense`.", "γ of the schedule.", "0 for none.", "‖W‖."]
)
def test_phrases_that_stand_alone_pass(text: str) -> None:
    assert not fault_of_text(Entry("Args", ("name",), text))


def test_all_kinds_of_definitions_are_read() -> None:
    read = {
        name
        for module in ("fedpara_edge.factors.layout", "fedpara_edge.nn.init")
        for name, _ in definitions(import_module(module))
    }
    expected = {"LayerSpec", "LayerSpec.matrix_shape", "Layout.from_json", "Layout.shared", "Layout.parts", "_fields"}
    assert expected | {"initialize"} <= read
