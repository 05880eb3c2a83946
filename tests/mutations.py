"""Mutations of files by their structure: fields of JSON, TOML and protobuf, tensors, lines and bytes."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

from fedpara_edge.storage.protobuf import fields

Mutate: TypeAlias = Callable[[bytes, Random], bytes]
Made: TypeAlias = tuple[Sequence[Path], Callable[[Path], object]]
"""Files of a format, and what reads one of them when it was mutated."""


class Raw(str):
    """Text that stands in a document as it is."""

    __slots__ = ()


class Pairs(list[list[Any]]):
    """A JSON object as pairs of key and value, of which keys may come twice."""


HOSTILE = tuple(
    map(
        Raw,
        ("null", "true", "false", "0", "-1", "1", "2", "0.5", "-0.0", "1e308", "1e400", "NaN", "-Infinity", "inf",
         "4294967296", "9223372036854775807", "18446744073709551616", "1" + "0" * 400, "1" + "0" * 5000,
         '""', '"x"', '"\\u0000"', '"\\ud800"', '"\\u001b[2J"', '"line\\nline"', '"../../x"', '"/etc/passwd"',
         '"float32"', f'"{"a" * 5000}"', f'"{"f" * 64}"', "[]", "{}", "[[]]", "[1]", "[1.5, null]", '{"a": 1}',
         "[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000, "[" + "0," * 3000 + "0]"),
    )
)  # fmt: skip


def in_bytes(content: bytes, random: Random) -> bytes:
    """Bytes with some of them changed, lost, doubled or made up."""
    mutant = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        at, count = random.randrange(len(mutant) + 1), random.choice((1, 1, 2, 4, 8, 64))
        match random.randrange(6):
            case 0 if at < len(mutant):
                mutant[at] ^= 1 << random.randrange(8)
            case 1 if at < len(mutant):
                mutant[at] = random.randrange(256)
            case 2:
                del mutant[at : at + count]
            case 3:
                mutant[at:at] = mutant[at : at + count]
            case 4:
                mutant[at : at + count] = bytes([random.choice((0, 127, 128, 255))] * count)
            case 5 if random.random() < 0.3:
                del mutant[at:]
    return bytes(mutant)


def in_json(content: bytes, random: Random) -> bytes:
    """A JSON text with changed values and fields; now and then with changed bytes."""
    try:
        tree = json.loads(content, object_pairs_hook=lambda pairs: Pairs(map(list, pairs)))
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, list) or random.random() < 0.1:
        return in_bytes(content, random)
    return to_json(mutated(tree, random)).encode("utf-8", "surrogatepass")


def in_lines(content: bytes, random: Random) -> bytes:
    """Lines of JSON, of which some are changed, lost, doubled or in another order."""
    lines = content.splitlines(keepends=True)
    at = random.randrange(len(lines))
    match random.randrange(8):
        case 0:
            return in_bytes(content, random)
        case 1:
            lines.insert(random.randrange(len(lines)), lines[at])
        case 2:
            lines.pop(at)
        case _:
            lines[at] = in_json(lines[at], random).rstrip(b"\n") + b"\n"
    return b"".join(lines)


def in_toml(content: bytes, random: Random) -> bytes:
    """A TOML text with changed values and keys; now and then with changed bytes."""
    if random.random() < 0.2:
        return in_bytes(content, random)
    tree = json.loads(json.dumps(tomllib.loads(content.decode())), object_pairs_hook=lambda p: Pairs(map(list, p)))
    found = mutated(tree, random)
    return "".join(f"{json.dumps(key)} = {_to_toml(value)}\n" for key, value in found).encode("utf-8", "surrogatepass")


def in_tensors(content: bytes, random: Random) -> bytes:
    """A tensor file with a changed header, table or tensor, whose other parts still fit; or with changed bytes."""
    length = int.from_bytes(content[:8], "little")
    table, data = content[8 : 8 + length], bytearray(content[8 + length :])
    match random.randrange(8):
        case 0:
            return in_bytes(content, random)
        case 1 | 2:
            table = in_json(table, random)
        case 3 | 4 if data:
            at = random.randrange(len(data)) // 4 * 4
            values = ("0000c07f", "0000807f", "ffff7f7f", "01000000", "00000000", "000080ff")  # NaN, Inf, largest …
            data[at : at + 4] = bytes.fromhex(random.choice(values))
        case 5 if data:
            data = bytearray(in_bytes(bytes(data), random))
        case _:
            parsed = json.loads(table)
            header = json.loads(parsed["__metadata__"]["fedpara_edge"])
            if random.random() < 0.7:  # what has none is read as a file of an older release
                header.pop("digest", None)
            text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
            parsed["__metadata__"]["fedpara_edge"] = in_json(text, random).decode("utf-8", "replace")
            table = json.dumps(parsed, separators=(",", ":")).encode()
    table += b" " * (-len(table) % 8)
    return len(table).to_bytes(8, "little") + table + bytes(data)


def in_protobuf(content: bytes, random: Random) -> bytes:
    """A protobuf message with a changed field at any depth, whose lengths still fit; or with changed bytes."""
    if content.startswith(b"{"):
        return in_json(content, random)
    try:
        found = [[number, value] for number, value in fields(memoryview(content))]
    except ValueError:
        found = []
    if not found or random.random() < 0.05:
        return in_bytes(content, random)
    field = random.choice(found)
    match random.randrange(12):
        case 0:
            found.remove(field)
        case 1:
            found.insert(random.randrange(len(found)), field)
        case 2:
            field[0] = random.choice((1, 2, 3, 4, 5, 6, 7, 14, 15, 20, 536870911))
        case 3:
            field[1] = random.choice((0, 1, 127, 1 << 31, 1 << 63, (1 << 64) - 1, b"", b"x" * 300))
        case _ if isinstance(field[1], int):
            field[1] = random.choice((0, 1, 2, 7, 16, 127, 1 << 31, 1 << 63, (1 << 64) - 1))
        case _:
            field[1] = in_protobuf(bytes(field[1]), random)
    return b"".join(_field(number, value) for number, value in found)


def mutated(tree: Any, random: Random) -> Any:
    """A tree of JSON, changed in one to three places."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = list(_places(tree))
        if places:
            _change(random.choice(places), places, random)
    return tree


def _places(tree: Any) -> Any:
    """Every list and position in it that holds a value."""
    if isinstance(tree, Pairs):
        for number, pair in enumerate(tree):
            yield tree, number
            yield from _places(pair[1])
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield tree, number
            yield from _places(value)


def _change(place: tuple[Any, int], places: Sequence[tuple[Any, int]], random: Random) -> None:
    inside, number = place
    if number >= len(inside):
        return
    is_object = isinstance(inside, Pairs)
    slot, at = (inside[number], 1) if is_object else (inside, number)
    match random.randrange(10):
        case 0:
            del inside[number]
        case 1:
            inside.insert(random.randrange(len(inside)), list(inside[number]) if is_object else inside[number])
        case 2 if is_object:
            slot[0] = random.choice(("", "x", "name", "digest", "a" * 300, "\x1b[2J", "../x", slot[0] + "x"))
        case 3 if is_object:
            inside.append([random.choice(("", "more", "version")), random.choice(HOSTILE)])
        case 4:
            other, position = random.choice(places)
            if position < len(other):
                found = other[position]
                slot[at] = deepcopy(found[1] if isinstance(other, Pairs) else found)
        case 5:
            slot[at] = [slot[at]]
        case 6 if isinstance(slot[at], int | float):
            slot[at] += random.choice((1, -1, slot[at], -2 * slot[at], 0.5))
        case 7 if isinstance(slot[at], str) and not isinstance(slot[at], Raw):
            slot[at] = in_bytes(slot[at].encode("utf-8", "replace"), random).decode("utf-8", "replace")
        case _:
            slot[at] = random.choice(HOSTILE)


def to_json(tree: Any) -> str:
    """A tree as a JSON text."""
    return _to_text(tree, between=",", after_key=":")


def _to_toml(tree: Any) -> str:
    return _to_text(tree, between=", ", after_key=" = ")


def _to_text(tree: Any, **signs: str) -> str:
    if isinstance(tree, Raw):
        return str(tree)
    if isinstance(tree, Pairs):
        pairs = (f"{json.dumps(key)}{signs['after_key']}{_to_text(value, **signs)}" for key, value in tree)
        return "{" + signs["between"].join(pairs) + "}"
    if isinstance(tree, list):
        return "[" + signs["between"].join(_to_text(value, **signs) for value in tree) + "]"
    return json.dumps(tree)


def _field(number: int, value: int | bytes | memoryview) -> bytes:
    """A field of a protobuf message, a number as a varint."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + bytes(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
