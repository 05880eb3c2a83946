"""Files that are read whole: texts, keys and metadata, which are regular files and small.

Anybody may have put something else under their names. Opening a pipe would wait for its writer, and a device, or a file
that was made huge, would fill the memory.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

MAX_BYTES = 1 << 25
"""Largest text, some times the largest list of clients or updates that can be read."""
JOURNAL_BYTES = 1 << 30
"""Largest journal of lines, which grows with every round."""


def check_regular(path: Path, *, max_bytes: int | None = None) -> None:
    """Refuse what is no regular file, or a larger one, before it is opened.

    Args:
        path: Path.
        max_bytes: Largest size; None for any.

    Raises:
        OSError: It is something else, or missing.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "a folder, pipe or device", str(path))
    if max_bytes is not None and status.st_size > max_bytes:
        raise OSError(errno.EFBIG, f"a file of more than {max_bytes} bytes", str(path))


def read_whole(path: Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Content of a regular file.

    Raises:
        OSError: It can't be read, is something else, or is larger.
    """
    check_regular(path, max_bytes=max_bytes)
    return path.read_bytes()


def real_path(path: Path) -> Path:
    """Absolute path without links, as far as these lead anywhere; `Path.resolve` ends with an error if they don't."""
    return Path(os.path.realpath(path))


def read_text(path: Path) -> str:
    """Text of a regular file in UTF-8, with any ends of lines.

    Raises:
        OSError: It can't be read, is something else, or is larger than `MAX_BYTES`.
        ValueError: It is no UTF-8.
    """
    return read_whole(path).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
