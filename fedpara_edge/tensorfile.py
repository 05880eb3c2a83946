"""Tensors and one JSON header in a safetensors file: the container of every file of ours that holds numbers.

The file is standard safetensors. Its metadata has the one key `fedpara_edge`, whose value is our header: JSON with
sorted keys, no spaces, and at least

    {"format": "<what the file is>", "version": <integer>, ...}

so that equal content gives equal bytes. Tensors lie end to end in the order that safetensors defines (by alignment of
the dtype, then by name), the first at byte 8 + N, N the little-endian uint64 at byte 0.

Reading never maps the file: entries are read by offset into buffers the caller owns, so that memory does not grow with
the number of files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedpara_edge.errors import FedparaError
from fedpara_edge.files import replacing_file

KEY = "fedpara_edge"
_DTYPES = {
    "F32": "float32",
    "F64": "float64",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in a file: numpy dtype, shape, first byte, number of bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def write_tensors(path: Path, tensors: Mapping[str, NDArray[Any]], header: Mapping[str, Any]) -> None:
    """Write tensors and header to `path`, atomically; equal arguments give equal bytes.

    Raises:
        FedparaError: the disk is full or refuses the write.
    """
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)
    contiguous = {name: np.ascontiguousarray(tensor).reshape(tensor.shape) for name, tensor in tensors.items()}
    with replacing_file(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata={KEY: text})
        except SafetensorError as error:
            raise OSError(str(error)) from error


class TensorFile:
    """A file that `write_tensors` wrote, open for reading.

    Args:
        path: the file.
        format: what its header must say it is; None for any.
        error: the class of error to raise when it is not that.

    Attributes:
        header: the JSON header.
        entries: an `Entry` for each tensor, by name, in the order in which they lie in the file.

    Raises:
        error: the file is missing, truncated, not safetensors, or not of `format` and a known version.
    """

    def __init__(self, path: Path, *, format: str | None, version: int = 1, error: type[FedparaError]) -> None:
        self.path = path
        self.error = error
        try:
            self.size_bytes = path.stat().st_size
            with safe_open(path, "numpy") as file:
                metadata = file.metadata() or {}
                slices = {name: file.get_slice(name) for name in file.offset_keys()}
                shapes = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
            self._file = path.open("rb", buffering=0)
        except OSError as cause:
            raise error(f"{path}: expected a readable file, found {cause.strerror or cause}") from cause
        except SafetensorError as cause:
            raise error(
                f"{path}: expected a whole safetensors file, found a damaged or foreign one ({cause}); send it again"
            ) from cause
        try:
            self.header = self._parse_header(metadata, format, version)
            self.entries = self._locate(shapes)
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str) -> NDArray[Any]:
        """The tensor of that name, as a new array."""
        entry = self.entries[name]
        array = np.empty(entry.shape, entry.dtype)
        self.read_into(entry.offset, array)
        return array

    def read_into(self, offset: int, out: NDArray[Any]) -> None:
        """Fill the contiguous array `out` with the bytes from `offset` on.

        Raises:
            FedparaError: the file became shorter since it was opened.
        """
        view = out.reshape(-1).view(np.uint8).data
        self._file.seek(offset)
        done = 0
        while done < len(view):
            count = self._file.readinto(view[done:])
            if not count:
                raise self.error(
                    f"{self.path}: expected {offset + len(view)} bytes, found {offset + done}; send it again"
                )
            done += count

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _parse_header(self, metadata: Mapping[str, str], format: str | None, version: int) -> dict[str, Any]:
        expected = format or "a fedpara-edge file"
        try:
            header = json.loads(metadata[KEY])
            found, found_version = header["format"], header["version"]
        except (KeyError, TypeError, ValueError) as cause:
            raise self.error(
                f"{self.path}: expected {expected}, found a safetensors file without our header"
            ) from cause
        if format is not None and found != format:
            raise self.error(f"{self.path}: expected {expected}, found {found}; check the order of the arguments")
        if found_version != version:
            raise self.error(
                f"{self.path}: expected {found} version {version}, found version {found_version}; "
                "use the fedpara-edge release that wrote it"
            )
        return dict(header)

    def _locate(self, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Entry]:
        header_bytes = int.from_bytes(self._file.read(8), "little")
        offset = 8 + header_bytes
        entries: dict[str, Entry] = {}
        for name, (code, shape) in shapes.items():
            if code not in _DTYPES:
                raise self.error(
                    f"{self.path}: tensor {name!r}: expected a dtype of {', '.join(_DTYPES)}, found {code}"
                )
            dtype = _DTYPES[code]
            nbytes = math.prod(shape) * np.dtype(dtype).itemsize
            entries[name] = Entry(dtype, shape, offset, nbytes)
            offset += nbytes
        return entries
