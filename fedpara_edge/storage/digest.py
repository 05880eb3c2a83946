"""The digest that a file states of itself, so that a value that was flipped on a disk is noticed when it is read.

Its header field `digest` is the hexadecimal SHA-256 of the header without this field (JSON with sorted keys and no
spaces), a line feed, and the hexadecimal digest of the content. That is `content_digest` unless the format says
otherwise: the SHA-256 of, by name, each tensor's name in UTF-8, a zero byte, its dtype and shape (`float32 [2, 3]`), a
zero byte, and its values in C order, little-endian.

Releases up to 0.2 pass over the field. Files of theirs have none, and are read without.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.errors import brief_text
from fedpara_edge.storage.tensorfile import TensorFile

FIELD = "digest"
_PIECE_BYTES = 1 << 20


def with_digest(header: Mapping[str, Any], content: str) -> dict[str, Any]:
    """A header with the digest of itself and of the content.

    Args:
        header: Header without a digest, plain JSON data.
        content: Hexadecimal digest of the content.
    """
    return {**header, FIELD: _digest(header, content)}


def content_digest(tensors: Mapping[str, NDArray[Any]]) -> str:
    """Hexadecimal digest of tensors, as the module describes it."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        _add(found, name, np.asarray(tensors[name]))
    return found.hexdigest()


def stored_digest(file: TensorFile) -> str:
    """The digest of the tensors in an open file (`content_digest`), read in pieces of which none is large.

    Raises:
        FedparaError: The file can't be read.
    """
    found, piece = hashlib.sha256(), np.empty(_PIECE_BYTES, np.uint8)
    for name in sorted(file.entries):
        entry = file.entries[name]
        found.update(_label(name, entry.dtype, entry.shape))
        for start in range(0, entry.nbytes, _PIECE_BYTES):
            part = piece[: min(_PIECE_BYTES, entry.nbytes - start)]
            file.read_into(entry.offset + start, part)
            found.update(part.data)
    return found.hexdigest()


def check_digest(file: TensorFile, content: str) -> None:
    """Compare the digest that a file states, if it does, with that of its header and content.

    Args:
        file: File, whose header is as it was read.
        content: Hexadecimal digest of the content.

    Raises:
        FedparaError: They differ; the error is of the class that the file was opened with.
    """
    header = dict(file.header)
    if FIELD in header and header.pop(FIELD) != _digest(header, content):
        raise file.error(
            f"{file.path}: expected content with the digest {brief_text(file.header[FIELD], max_length=12)}, found "
            f"other content: it was changed or damaged; {file.remedy}",
            code="digest",
        )


def read_checked(file: TensorFile, names: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
    """Tensors of an open file by name, once its digest was compared; hashed on another core while the next are read.

    Args:
        file: Open file, whose content is digested by `content_digest`.
        names: Names of the tensors to return; None for all.

    Raises:
        FedparaError: The file can't be read, or is not what its digest says.
    """
    wanted = set(file.entries if names is None else names)
    if FIELD not in file.header:
        return {name: file.read(name) for name in file.entries if name in wanted}
    tensors, found = {}, hashlib.sha256()
    with ThreadPoolExecutor(max_workers=1) as hashing:
        for name in sorted(file.entries):
            tensor = file.read(name)
            hashing.submit(_add, found, name, tensor)
            if name in wanted:
                tensors[name] = tensor
    check_digest(file, found.hexdigest())
    return {name: tensors[name] for name in file.entries if name in wanted}


def _add(digest: Any, name: str, tensor: NDArray[Any]) -> None:
    digest.update(_label(name, tensor.dtype.name, tensor.shape))
    digest.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)


def _label(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    return f"{name}\0{dtype} {list(shape)}\0".encode(errors="surrogatepass")


def _digest(header: Mapping[str, Any], content: str) -> str:
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"{text}\n{content}".encode()).hexdigest()
