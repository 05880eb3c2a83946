"""Tables as columns: CSV with a line of names first, by the standard library, and Parquet by pyarrow.

A column is int64 if all its cells are whole numbers, float64 if all are numbers, and text otherwise.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.errors import InputError
from fedpara_edge.installation import install_line
from fedpara_edge.storage.wholefile import check_regular

Columns = dict[str, NDArray[Any]]
"""Columns [rows] by name, in their order."""
CSV, PARQUET = frozenset({".csv", ".tsv"}), frozenset({".parquet", ".pq"})
SUFFIXES = CSV | PARQUET
DELIMITERS = ",;\t|"
CHUNK_ROWS = 4096
MAX_LINE = 1 << 24


def read_table(path: Path) -> Columns:
    """Columns of a table.

    Raises:
        InputError: The file is damaged, has no rows, a name twice, or a column that holds neither numbers nor text; or
            pyarrow is needed and not installed.
    """
    columns = _read_csv(path) if path.suffix.lower() in CSV else _read_parquet(path)
    if not columns or not len(next(iter(columns.values()))):
        raise InputError(f"{path}: expected names of columns and at least one row, found none; add rows")
    return columns


def numbers(path: Path, name: str, column: NDArray[Any]) -> NDArray[Any]:
    """A column that must hold numbers.

    Raises:
        InputError: A cell is text, which is named, or not finite.
    """
    if column.dtype.kind == "U":
        row = next(number for number, cell in enumerate(column) if not _is_number(cell))
        raise InputError(
            f"{path}: column {name!r}, row {row}: expected a number, found {str(column[row])!r}; fill in or remove "
            "such rows, or name each column of the input with --column"
        )
    bad = ~np.isfinite(column)
    if bad.any():
        raise InputError(
            f"{path}: column {name!r}, row {int(np.argmax(bad))}: expected a finite number, found "
            f"{column[np.argmax(bad)]}; fill in or remove such rows"
        )
    return column


def _read_csv(path: Path) -> Columns:
    """Two passes: what the columns hold and how many rows there are, then the cells."""
    names, kinds, rows = _survey(path)
    columns: Columns = {name: np.empty(rows, kind) for name, kind in zip(names, kinds, strict=True)}
    start = 0
    for cells in _chunks(path):
        for column, values in zip(columns.values(), zip(*cells, strict=True), strict=True):
            column[start : start + len(cells)] = np.array(values).astype(column.dtype)
        start += len(cells)
    return columns


def _survey(path: Path) -> tuple[list[str], list[str], int]:
    """Names, dtypes and number of rows."""
    rows = 0
    with _opened(path) as file:
        names = next(csv.reader(file, delimiter=_delimiter(path)), [])
    if len({*names}) < len(names) or not all(names):
        raise InputError(f"{path}: expected a first line with a name for each column, found {names}; add or change it")
    kinds, widths = ["i8"] * len(names), [1] * len(names)
    for cells in _chunks(path):
        columns = [np.array(values) for values in zip(*cells, strict=True)]
        kinds = [_kind(column, kind) for column, kind in zip(columns, kinds, strict=True)]
        widths = [max(width, column.dtype.itemsize // 4) for width, column in zip(widths, columns, strict=True)]
        rows += len(cells)
    return names, [f"U{width}" if kind == "U" else kind for kind, width in zip(kinds, widths, strict=True)], rows


def _kind(cells: NDArray[np.str_], kind: str) -> str:
    """Narrowest of int64, float64 and text, from `kind` on, that holds the cells."""
    for candidate in ("i8", "f8")[("i8", "f8", "U").index(kind) :]:
        try:
            cells.astype(candidate)
        except (ValueError, OverflowError):
            continue
        return candidate
    return "U"


def _chunks(path: Path) -> Iterator[list[list[str]]]:
    """Rows below the names, some thousand at a time, without empty lines."""
    with _opened(path) as file:
        reader = csv.reader(file, delimiter=_delimiter(path))
        try:
            names = next(reader, [])
            cells: list[list[str]] = []
            for row in reader:
                if not row:
                    continue
                if len(row) != len(names):
                    raise InputError(
                        f"{path}: line {reader.line_num}: expected {len(names)} cells as in the first line, found "
                        f"{len(row)}; correct this line"
                    )
                cells.append(row)
                if len(cells) == CHUNK_ROWS:
                    yield cells
                    cells = []
            if cells:
                yield cells
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{path}: expected a table of text in UTF-8, found {error}; save it again") from error


@contextmanager
def _opened(path: Path) -> Iterator[Iterator[str]]:
    """The lines of a table, none of which is too long."""
    try:
        check_regular(path)
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield _lines(path, file)
    except OSError as error:
        raise InputError(f"{path}: expected a table, found {error.strerror}; check the path") from error


def _lines(path: Path, file: IO[str]) -> Iterator[str]:
    while line := file.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise InputError(f"{path}: expected lines of less than {MAX_LINE} characters, found a longer one; split it")
        yield line


def _delimiter(path: Path) -> str:
    """The delimiter that the first line has most often."""
    with _opened(path) as file:
        try:
            line = next(file, "")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: expected a table of text in UTF-8, found {error}; save it again") from error
    return max(DELIMITERS, key=line.count)


def _is_number(cell: Any) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _read_parquet(path: Path) -> Columns:
    pyarrow, parquet = _pyarrow()
    try:
        check_regular(path)
        table = parquet.read_table(path)
        return {name: _as_numpy(path, name, table.column(name), pyarrow.types) for name in table.column_names}
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: expected a Parquet table, found {reason}; save it again") from error


def _as_numpy(path: Path, name: str, column: Any, types: Any) -> NDArray[Any]:
    if column.null_count:
        values = column.is_null().to_numpy()
        raise InputError(
            f"{path}: column {name!r}, row {int(np.argmax(values))}: expected a value, found none; fill in or remove "
            "such rows"
        )
    kind = column.type
    if types.is_dictionary(kind):
        column, kind = column.combine_chunks().dictionary_decode(), kind.value_type
    whole: Callable[[Any], bool] = types.is_integer
    if types.is_boolean(kind) or whole(kind):
        return np.asarray(column.to_numpy()).astype(np.int64)
    if types.is_floating(kind) or types.is_decimal(kind):
        return np.asarray(column.to_numpy()).astype(np.float64)
    if types.is_string(kind) or types.is_large_string(kind):
        return np.array(column.to_pylist(), np.str_)
    raise InputError(
        f"{path}: column {name!r}: expected numbers or text, found {kind}; leave it out of the file, or save it as such"
    )


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(
            f"Parquet: expected pyarrow, found none ({error}); type: {install_line('data')}, or convert the table "
            "elsewhere with fedpara-edge data convert"
        ) from error
    return pyarrow, pyarrow.parquet
