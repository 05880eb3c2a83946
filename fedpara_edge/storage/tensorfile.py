"""The tensor file: tensors and one JSON header in a safetensors file, the container of all our files of numbers.

The file is standard safetensors. Its metadata has a single key `fedpara_edge`, whose value is our header: JSON with
sorted keys, no spaces, and at least

    {"format": "<what the file is>", "version": <integer>, ...}

so that equal content gives equal bytes. Tensors lie end to end in the order that safetensors defines (by alignment of
the dtype, then by name), the first at byte 8 + N, with N the little-endian uint64 at byte 0.

Reading never maps the file: entries are read by offset into buffers that the caller owns, so that memory does not grow
with the number of files, and a file that shrinks meanwhile is an error rather than the end of the process. Names of
tensors are compared with known ones and never used as paths.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from fedpara_edge.errors import FedparaError, InputError, WrongBundleError, brief_text
from fedpara_edge.storage.atomic import Ready, replacing_file
from fedpara_edge.storage.filekind import HEAD_BYTES, recognize
from fedpara_edge.storage.passing import PassingDigest
from fedpara_edge.storage.tensortable import (
    MAX_TABLE_BYTES,
    Entry,
    TableError,
    parse_entries,
    split_metadata,
    strict_json,
    table_bytes,
)

KEY = "fedpara_edge"
NOWHERE: Mapping[str, str] = {}
_SHARED_CHARACTERS = 1 << 18
"""Length of the longest table that is cached: that of a thousand tensors and more."""


def write_tensors(
    path: Path,
    tensors: Mapping[str, NDArray[Any]],
    header: Mapping[str, Any],
    *,
    overwrite: bool = True,
    ready: Ready | None = None,
) -> None:
    """Write tensors and header to `path`, atomically; equal arguments give equal bytes.

    Args:
        path: File to write.
        tensors: Tensors by name.
        header: Header, plain JSON data.
        overwrite: Whether to replace an existing file that has other content.
        ready: Function called once the file is complete, before it appears at `path`.

    Raises:
        OutputExistsError: `path` exists with other content, and `overwrite` is false.
        FedparaError: The disk is full or refuses the write, or the table would be too large to be read.
    """
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)
    contiguous = {name: np.ascontiguousarray(tensor).reshape(tensor.shape) for name, tensor in tensors.items()}
    with replacing_file(path, overwrite=overwrite, ready=ready) as temporary:
        try:
            save_file(contiguous, temporary, metadata={KEY: text})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        with temporary.open("rb") as file:
            if (length := int.from_bytes(file.read(8), "little")) > MAX_TABLE_BYTES:
                raise FedparaError(
                    f"{path}: expected a header of at most {MAX_TABLE_BYTES} bytes, found {length}, which nobody would "
                    "read; nothing was written: use shorter names of tensors"
                )


class TensorFile:
    """A file that `write_tensors` wrote, open for reading.

    Args:
        path: File to open.
        format: Format that the header must state; None for any.
        version: Version of the format that the header must state.
        error: Class of the errors to raise.
        remedy: Remedy for a damaged file, which ends the message.
        max_table_bytes: Largest table, header included; what is larger is refused unread.
        elsewhere: Remedies for files of other formats that are easily given in place of this one, by format.

    Attributes:
        header: The JSON header.
        entries: Place of each tensor, by name, in the order in which they lie in the file; files of equal layout share
            one mapping.
        data_offset: First byte after the table, where the first tensor begins.
        size_bytes: Size of the whole file.

    Raises:
        error: The file is missing, truncated, not safetensors, or not of `format` and `version`.
        InputError: The file is missing, where `error` is `WrongBundleError`.
    """

    def __init__(
        self,
        path: Path,
        *,
        format: str | None,
        version: int = 1,
        error: type[FedparaError],
        remedy: str = "copy it again",
        max_table_bytes: int = MAX_TABLE_BYTES,
        elsewhere: Mapping[str, str] = NOWHERE,
    ) -> None:
        self.path = path
        self.error = error
        self.remedy = remedy
        self._expected = format or "a fedpara-edge file"
        self._seeking = threading.Lock()
        self._sha256: str | None = None
        self._passing: PassingDigest | None = None
        self._refusal_of: Callable[[str], FedparaError | None] = lambda _: None
        self._open()
        try:
            self._stamp = self._current_stamp()
            self.size_bytes = os.fstat(self._file.fileno()).st_size
            metadata, self.entries = self._read_table(max_table_bytes)
            self.header = self._parse_header(metadata, format, version, elsewhere)
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str) -> NDArray[Any]:
        """Read a tensor into a new array."""
        entry = self.entries[name]
        array = np.empty(entry.shape, entry.dtype)
        self.read_into(entry.offset, array)
        return array

    def read_into(self, offset: int, out: NDArray[Any]) -> None:
        """Fill the contiguous array `out` with the bytes from `offset` on; several threads may do so at once.

        Raises:
            FedparaError: The file has become shorter since it was opened, or can't be read.
        """
        done = self._read_some(offset, out.data)
        if done == out.nbytes and self._passing is None:
            return
        view = out.reshape(-1).view(np.uint8).data
        while done < len(view):
            count = self._read_some(offset + done, view[done:])
            if not count:
                raise self.error(
                    f"{self.path}: expected {offset + len(view)} bytes, found {offset + done}; {self.remedy}",
                    code="truncated",
                )
            done += count
        if (passing := self._passing) is not None:
            passing.add(offset, view)

    @property
    def known_sha256(self) -> str | None:
        """Digest of the file if it was found, by `sha256` or `check_read`; None before."""
        return self._sha256

    def digest_while_read(self, refusal_of: Callable[[str], FedparaError | None] = lambda _: None) -> None:
        """Have the digest be found from what is read from now on, in place of reading the file for it.

        Args:
            refusal_of: Function of the digest that gives the error of a file which must not have it, for `check_read`
                and `sha256` to raise; None for one that may.

        Raises:
            FedparaError: The file can't be read.
        """
        self._refusal_of = refusal_of
        if self._sha256 is None and self._passing is None:
            self._passing = PassingDigest(self._read_some)
            self._passing.catch_up(self.data_offset)

    def check_read(self) -> None:
        """Compare what was read with what it should be (`check_unchanged`, `digest_while_read`), once all of it was.

        Raises:
            FedparaError: The file was changed, has another digest than it should, or can't be read.
        """
        self.check_unchanged()
        if self._passing is not None:
            self.sha256()

    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the whole file, which has to be open; `check_unchanged` holds for it.

        What did not pass (`digest_while_read`) is read.

        Raises:
            FedparaError: The file was changed, has another digest than it should, or can't be read.
        """
        if self._sha256 is None:
            found = (self._passing or PassingDigest(self._read_some)).finish()
            self.check_unchanged()
            self._sha256, self._passing = found, None
        if (refusal := self._refusal_of(self._sha256)) is not None:
            raise refusal
        return self._sha256

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def reopen(self) -> None:
        """Open the file again after `close`, without reading its header again.

        Raises:
            FedparaError: The file is gone or was changed.
        """
        self._open()
        try:
            self.check_unchanged()
        except BaseException:
            self._file.close()
            raise

    def check_unchanged(self) -> None:
        """Compare the open file's identity, size and times with those at its first opening.

        A program that writes to a file can set the time of its modification back, but not that of its change, where
        the system keeps one (everywhere but on Windows).

        Raises:
            FedparaError: The file was changed or replaced.
        """
        if self._current_stamp() != self._stamp:
            raise self.error(
                f"{self.path}: expected it as it was when its header was read, found it changed; {self.remedy}",
                code="changed",
            )

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> None:
        try:
            # Checked before opening: opening a pipe would wait for its writer.
            if not stat.S_ISREG(self.path.stat().st_mode):
                raise OSError("a folder, pipe or device")
            self._file = self.path.open("rb", buffering=0)
        except (OSError, ValueError) as cause:
            raise self._unreadable(cause) from cause

    def _unreadable(self, cause: OSError | ValueError) -> FedparaError:
        found = getattr(cause, "strerror", None) or cause
        # What is not there belongs to no other bundle: the name is at fault.
        is_missing = isinstance(cause, FileNotFoundError) and issubclass(self.error, WrongBundleError)
        kind = InputError if is_missing else self.error
        return kind(f"{self.path}: expected a readable file, found {found}; check the path", code="unreadable")

    def _current_stamp(self) -> tuple[int, ...]:
        status = os.fstat(self._file.fileno())
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def _read_some(self, offset: int, out: memoryview) -> int:
        try:
            if sys.platform != "win32":
                return os.preadv(self._file.fileno(), (out,), offset)
            else:  # noqa: RET505  (mypy knows the platform and would call code after a return dead)
                with self._seeking:
                    self._file.seek(offset)
                    return self._file.readinto(out) or 0
        except OSError as cause:
            raise self._unreadable(cause) from cause

    def _read_table(self, limit: int) -> tuple[Mapping[str, str], Mapping[str, Entry]]:
        head = np.empty(min(8, self.size_bytes), np.uint8)
        self.read_into(0, head)
        try:
            text = np.empty(table_bytes(head.tobytes(), self.size_bytes, limit=limit), np.uint8)
            self.read_into(8, text)
            self.data_offset = 8 + text.nbytes
            metadata, table = split_metadata(text.tobytes())
            # Cached because the updates of a round have equal tables: parsing each would cost a third of reading the
            # file. Longer tables are not: parsed, they take ten times their bytes, and anyone may have written them.
            entries = _shared_entries if len(table) <= _SHARED_CHARACTERS else parse_entries
            return metadata, entries(table, self.data_offset, self.size_bytes - self.data_offset)
        except TableError as cause:
            raise self._refusal(cause) from cause

    def _refusal(self, cause: TableError) -> FedparaError:
        head = np.empty(min(HEAD_BYTES, self.size_bytes), np.uint8)
        self.read_into(0, head)
        kind = recognize(head.tobytes(), self.path.suffix)
        if cause.code == "wrong_format":
            kind = "a safetensors file without our header"
        if kind is not None:
            return self.error(f"{self.path}: expected {self._expected}, found {kind}; check the path", code=cause.code)
        found = brief_text(str(cause), max_length=200)
        return self.error(
            f"{self.path}: expected a whole safetensors file, found {found}; {self.remedy}", code=cause.code
        )

    def _parse_header(
        self, metadata: Mapping[str, str], format: str | None, version: int, elsewhere: Mapping[str, str]
    ) -> dict[str, Any]:
        try:
            if len(metadata) != 1:
                raise ValueError("other metadata than the header")
            header = strict_json(metadata[KEY])
            found, found_version = header["format"], header["version"]
        except (KeyError, TypeError, ValueError) as cause:
            raise self.error(
                f"{self.path}: expected {self._expected}, found a safetensors file without our header; check the path",
                code="wrong_format",
            ) from cause
        if format is not None and found != format:
            remedy = elsewhere.get(found if isinstance(found, str) else "", "check the order of the arguments")
            raise self.error(
                f"{self.path}: expected {self._expected}, found {brief_text(found)}; {remedy}",
                code="wrong_format",
            )
        if found_version != version:
            raise self.error(
                f"{self.path}: expected {brief_text(found)} version {version}, found version "
                f"{brief_text(found_version)}; use the fedpara-edge release that wrote it",
                code="wrong_format",
            )
        return dict(header)


_shared_entries = lru_cache(maxsize=8)(parse_entries)
