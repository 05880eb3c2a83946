"""The cache of converted data: a folder of arrays for each content of a source and each way to read it.

It lies beside the source, in `.NAME.fedpara-edge`, or where that can't be written in the user's cache. An entry is
named by the SHA-256 of the content of all files and of how they were read, and written all at once. The hash is only
taken anew where names, sizes or times of the files differ from those at the time of writing (`source.json`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from fedpara_edge.storage.atomic import replacing_folder, sha256_of

VERSION = 1
RECORD = "source.json"


def cached(path: Path, files: Sequence[Path], how: str, convert: Callable[[Path], None]) -> Path:
    """Folder with the arrays of a source, converted if need be; entries of its former content are removed.

    Args:
        path: Source.
        files: Files of the source, in their order.
        how: Description of the way it is read, another one where the arrays differ.
        convert: Function that writes the arrays into a folder.

    Raises:
        InputError: A file can't be read, or from `convert`.
        FedparaError: The disk refuses a write.
    """
    place = _place(path)
    way = hashlib.sha256(f"{VERSION} {how}".encode()).hexdigest()[:16]
    seen = _digest(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)
    entries = {entry: _record(entry) for entry in place.glob(f"{way}-*")} if place.is_dir() else {}
    for entry, found in entries.items():
        if found == seen:
            return entry
    content = _digest(f"{file.relative_to(path.parent)} {sha256_of(file)}" for file in files)
    entry = place / f"{way}-{content[:32]}"
    if entry not in entries:
        place.mkdir(parents=True, exist_ok=True)
        with replacing_folder(entry) as making:
            convert(making)
            (making / RECORD).write_text(json.dumps({"seen": seen}) + "\n", encoding="utf-8")
        for former in entries:
            shutil.rmtree(former, ignore_errors=True)
    return entry


def _place(path: Path) -> Path:
    whole = path.absolute()
    beside = whole.with_name(f".{whole.name}.fedpara-edge")
    if os.access(beside if beside.is_dir() else whole.parent, os.W_OK | os.X_OK):
        return beside
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "fedpara-edge" / _digest([str(whole)])[:32]


def _record(entry: Path) -> str:
    try:
        return str(json.loads((entry / RECORD).read_text(encoding="utf-8"))["seen"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def _digest(lines: object) -> str:
    found = hashlib.sha256()
    for line in lines:  # type: ignore[attr-defined]
        found.update(f"{line}\n".encode(errors="surrogateescape"))
    return found.hexdigest()
