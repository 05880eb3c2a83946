"""The partial: the exact sum of some updates of a round, in place of the updates themselves.

Format `fedpara-edge/partial`, version 1 (container: `storage.tensorfile`). Header:

    format, version
    fingerprint   hexadecimal; of the bundle
    round         of the weights that the sum is to change
    base          SHA-256 of these weights (`weights`)
    algorithm     name of the server algorithm, which says what sums there are
    weighting     `examples` or `equal`: the weights n_i of the updates
    privacy       {"name": "gaussian", "clip", "noise"}: the d_i are clipped changes in steps of that grid, integers
                  (`privacy.mechanism`), to which no noise was added yet; absent without privacy
    lowest        {sum: level}: the level of the first row of each sum
    digest        hexadecimal; of all this and the content (`storage.digest`)

no others, and the arrays

    mean/0 …      int32 [levels, entries]; digits of Σ n_i d_i of the flat changes d_i (`codecs.codec`), one for each
                  mean of the algorithm, in further ones times 2^64 and the algorithm's factors (`aggregation.sums`)
    squares       int32 [levels, entries]; digits of Σ n_i d_i² of the running means, in the order of the flat change
    updates       uint8; UTF-8, a line of JSON for each update, sorted by client and round: {"client", "examples",
                  "steps", "metrics", "round", "base"} of its header, the "sha256" and "bytes" of its file, and the
                  "norms" of the changes of trained tensors and of running statistics, discounted if it is late
    conflicts     uint8; UTF-8, a line of JSON for each client of which several updates of one round were found, none
                  of which is in the sums, sorted likewise: {"client", "round", "sha256": [of each, ascending]}

With B = 2^32, a sum is Σ_k a_k B^(lowest + k) of its rows a_k, with -2^31 <= a_k < 2^31; neither the first nor the last
row is all 0. So the sum of the same updates has the same bytes, however it came about.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.algorithms import Weighting
from fedpara_edge.errors import FedparaError, InvalidUpdateError, WrongBundleError, brief, brief_text
from fedpara_edge.formats.tables import max_table_bytes
from fedpara_edge.formats.update import UpdateHeader, is_valid_client_name
from fedpara_edge.formats.weights import Weights
from fedpara_edge.storage.atomic import Ready
from fedpara_edge.storage.digest import FIELD, check_digest, content_digest, stored_digest, with_digest
from fedpara_edge.storage.tensorfile import TensorFile, write_tensors
from fedpara_edge.storage.tensortable import strict_json

FORMAT = "fedpara-edge/partial"
REMEDY = "make it again"
MAX_LEVEL = 32
"""Largest level, and the negative of the smallest, that sums of float32 numbers reach by far."""
MAX_LIST_BYTES = 1 << 24
"""Largest list of updates or conflicts, of some fifty thousand clients."""
MAX_LINE_BYTES = 1 << 16
_FIELDS = ("client", "examples", "steps", "metrics", "round", "base")
_DIGEST = re.compile(r"[0-9a-f]{64}")

Conflicts = Mapping[tuple[str, int], Sequence[str]]
"""Digests of the updates of which several were found, by client and round."""


@dataclass(frozen=True, kw_only=True)
class Counted:
    """An update that is in the sums.

    Args:
        header: Header of the update file.
        sha256: Digest of its file, hexadecimal.
        bytes: Size of its file.
        norms: Norms of the changes of trained tensors and of running statistics.
    """

    header: UpdateHeader
    sha256: str
    bytes: int
    norms: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Digits:
    """A vector of exact sums.

    Args:
        lowest: Level of the first row.
        rows: Digits, int32 [levels, entries].
    """

    lowest: int
    rows: NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class PartialHeader:
    """Weights, algorithm, weighting and clipping that a partial is the sum for; the module describes the fields."""

    fingerprint: str
    round: int
    base: str
    algorithm: str
    weighting: Weighting
    privacy: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields that the partial has, plain data for `json.dumps`."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Partial:
    """The content of a partial.

    Args:
        header: Weights, algorithm, weighting and clipping that it is the sum for.
        counted: Updates in the sums, sorted by client.
        conflicts: Digests of the updates of which several were found for a client and round; none is in the sums.
        sums: Exact sums by name.
    """

    header: PartialHeader
    counted: Sequence[Counted]
    conflicts: Conflicts = field(default_factory=dict)
    sums: Mapping[str, Digits]


def write_partial(path: Path, partial: Partial, *, overwrite: bool = True, seal: Ready | None = None) -> str:
    """Write a partial, atomically; return its digest.

    Args:
        path: File to write.
        partial: Content of the partial.
        overwrite: Whether to replace an existing file that has other content.
        seal: Function that signs the complete file before it appears at `path`; None for none.

    Raises:
        OutputExistsError: The file exists with other content, and `overwrite` is false.
        FedparaError: There are too many updates, or the disk refuses the write.
    """
    updates = [_line_of(each) for each in partial.counted]
    conflicts = [
        {"client": client, "round": number, "sha256": sorted(found)}
        for (client, number), found in sorted(partial.conflicts.items())
    ]
    arrays: dict[str, NDArray[Any]] = {
        **{name: digits.rows for name, digits in partial.sums.items()},
        "updates": _lines(updates),
        "conflicts": _lines(conflicts),
    }
    if (largest := max(arrays["updates"].nbytes, arrays["conflicts"].nbytes)) > MAX_LIST_BYTES:
        raise FedparaError(
            f"{path}: expected a list of at most {MAX_LIST_BYTES} bytes, found one of {largest} for {len(updates)} "
            "updates; make several partials, and finalize these together"
        )
    header = {
        "format": FORMAT,
        "version": 1,
        **partial.header.to_json(),
        "lowest": {name: digits.lowest for name, digits in partial.sums.items()},
    }
    digested = with_digest(header, content_digest(arrays))
    write_tensors(path, arrays, digested, overwrite=overwrite, ready=seal)
    return str(digested[FIELD])


class PartialFile:
    """A partial that was verified, open for the digits of its sums.

    Args:
        path: File of the partial.
        weights: Weights that it must be for.
        expected: Algorithm, weighting and clipping that it must be for.
        entries: Number of entries of each sum that it must have, by name.

    Attributes:
        counted: Updates in the sums, sorted by client and round.
        conflicts: Digests of conflicting updates, by client and round.
        digest: Digest that it states.

    Raises:
        InvalidUpdateError: The file is missing, damaged or something else, or a field or array does not fit.
        WrongBundleError: It is for other weights.
    """

    def __init__(self, path: Path, weights: Weights, expected: PartialHeader, entries: Mapping[str, int]) -> None:
        limit = max_table_bytes(weights.layout)
        self._file = TensorFile(path, format=FORMAT, error=InvalidUpdateError, remedy=REMEDY, max_table_bytes=limit)
        try:
            self._check_header(expected, entries)
            self._check_arrays(entries)
            check_digest(self._file, stored_digest(self._file))
            self.counted = self._read_counted(weights.fingerprint)
            self.conflicts = self._read_conflicts()
        finally:
            self._file.close()

    @property
    def path(self) -> Path:
        """Path of the file."""
        return self._file.path

    def digits(self, name: str) -> Iterator[tuple[int, NDArray[np.int32]]]:
        """Level and digits, int32 [entries], of each row of a sum.

        Raises:
            InvalidUpdateError: The file is gone or was changed.
        """
        entry = self._file.entries[name]
        levels, entries = entry.shape
        self._file.reopen()
        with self._file:
            for row in range(levels):
                digits = np.empty(entries, np.int32)
                self._file.read_into(entry.offset + row * digits.nbytes, digits)
                yield self._lowest[name] + row, digits
            self._file.check_unchanged()

    def _check_header(self, expected: PartialHeader, entries: Mapping[str, int]) -> None:
        fields = vars(expected)
        header = {"privacy": None, **self._file.header}
        unknown = header.keys() ^ {"format", "version", *fields, "lowest", FIELD}
        if unknown:
            raise self._refuse(f"expected the header fields of version 1, found another set: {brief(min(unknown))}")
        for name, value in fields.items():
            if header[name] != value:
                text = f"{self.path}: {name}: expected {_spelled(value)}, found {_spelled(header[name])}"
                if name in ("algorithm", "weighting", "privacy"):
                    raise InvalidUpdateError(f"{text}; make it with the server's options", code="wrong_algorithm")
                raise WrongBundleError(f"{text}; make it for the weights of the round", code=f"wrong_{name}")
        lowest = header["lowest"]
        if not (
            isinstance(lowest, dict)
            and lowest.keys() == entries.keys()
            and all(type(level) is int and abs(level) <= MAX_LEVEL for level in lowest.values())
        ):
            raise self._refuse(f"expected the lowest levels of {', '.join(entries)}, found {brief(lowest)}")
        self._lowest: Mapping[str, int] = lowest
        self.digest = str(header[FIELD])

    def _check_arrays(self, entries: Mapping[str, int]) -> None:
        found = self._file.entries
        if found.keys() != {*entries, "updates", "conflicts"}:
            raise self._refuse(f"expected the arrays {', '.join((*entries, 'updates', 'conflicts'))}, found others")
        for name, count in entries.items():
            shape = found[name].shape
            fits = len(shape) == 2 and shape[1] == count and self._lowest[name] + shape[0] <= MAX_LEVEL
            if found[name].dtype != "int32" or not fits:
                raise self._refuse(f"array {name!r}: expected int32 [levels, {count}], found another")
        for name in ("updates", "conflicts"):
            if found[name].dtype != "uint8" or found[name].nbytes > MAX_LIST_BYTES:
                raise self._refuse(f"array {name!r}: expected at most {MAX_LIST_BYTES} bytes of uint8, found another")

    def _read_counted(self, fingerprint: str) -> tuple[Counted, ...]:
        found = []
        for line in self._read_lines("updates"):
            try:
                fields = {name: line.pop(name) for name in _FIELDS}
                sha256, size, (trained, statistics) = line.pop("sha256"), line.pop("bytes"), line.pop("norms")
                fits = not line and type(size) is int and size > 0 and _is_digest(sha256)
                if not (fits and _is_norm(trained) and _is_norm(statistics)):
                    raise ValueError("a field that does not fit")
                counted = UpdateHeader(fingerprint=fingerprint, **fields)
            except (InvalidUpdateError, KeyError, TypeError, ValueError) as error:
                raise self._refuse(f"expected a list of updates, found a bad entry ({error})") from error
            norms = (float(trained), float(statistics))
            found.append(Counted(header=counted, sha256=sha256, bytes=size, norms=norms))
        self._check_order([each.header.sender for each in found])
        return tuple(found)

    def _read_conflicts(self) -> Conflicts:
        found: dict[tuple[str, int], tuple[str, ...]] = {}
        senders = []
        for line in self._read_lines("conflicts"):
            client, number, digests = line.get("client"), line.get("round"), line.get("sha256")
            if not (
                line.keys() == {"client", "round", "sha256"}
                and type(number) is int
                and isinstance(client, str)
                and is_valid_client_name(client)
                and isinstance(digests, list)
                and all(map(_is_digest, digests))
            ):
                raise self._refuse("expected a list of conflicts, found a bad entry")
            senders.append((client, number))
            found[client, number] = tuple(digests)
        self._check_order(senders)
        return found

    def _read_lines(self, name: str) -> Iterator[dict[str, Any]]:
        data = self._file.read(name).tobytes()
        for line in data.splitlines():
            try:
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(f"a line of {len(line)} bytes")
                value = strict_json(line.decode())
                if not isinstance(value, dict):
                    raise ValueError("no object")
            except ValueError as error:
                raise self._refuse(f"array {name!r}: expected lines of JSON, found {error}") from error
            yield value

    def _check_order(self, senders: Sequence[tuple[str, int]]) -> None:
        if any(one >= other for one, other in pairwise(senders)):
            raise self._refuse("expected each client and round once, in order, found another list")

    def _refuse(self, text: str) -> InvalidUpdateError:
        return InvalidUpdateError(f"{self.path}: {text}; {REMEDY}", code="partial")


def _spelled(value: Any) -> str:
    """A field of the header for a message."""
    if isinstance(value, str):
        return brief_text(value, max_length=12)
    return brief(value, max_length=100) if value is not None else "none"


def _line_of(counted: Counted) -> dict[str, Any]:
    header = asdict(counted.header)
    facts = {"sha256": counted.sha256, "bytes": counted.bytes, "norms": list(counted.norms)}
    return {**{name: header[name] for name in _FIELDS}, **facts}


def _lines(values: Sequence[Mapping[str, Any]]) -> NDArray[np.uint8]:
    lines = (json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False) for value in values)
    return np.frombuffer("".join(f"{line}\n" for line in lines).encode(), np.uint8)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _is_norm(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max
