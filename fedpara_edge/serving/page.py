"""The page for phones, as `make page` writes it: files with their forms in brotli and gzip beside them."""

from __future__ import annotations

import mimetypes
from dataclasses import dataclass
from pathlib import Path

from fedpara_edge.errors import InputError
from fedpara_edge.storage.atomic import sha256_of

POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy of all that is handed out: the page talks to its own server and to no other."""
_TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}
_CODINGS = {"br": ".br", "gzip": ".gz"}
INDEX = "index.html"
MAX_FILE_BYTES = 1 << 28
"""Largest file of a page, ten times that of the runtime in it."""


@dataclass(frozen=True)
class PageFile:
    """A file of the page in one form.

    Args:
        path: File on the disk.
        media_type: Type of its content.
        coding: Name of its compression in HTTP; None for none.
        digest: SHA-256 of the file.
    """

    path: Path
    media_type: str
    coding: str | None
    digest: str


class Page:
    """The page, whose files are read once for their digests.

    Args:
        folder: Folder of the page.

    Raises:
        InputError: It is none, or has a file that is too large or can't be read.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / INDEX).is_file():
            raise InputError(f"{folder}: expected the page that `make page` writes, found no {INDEX} in it", key="page")
        self._forms: dict[str, dict[str | None, PageFile]] = {}
        suffixes = {suffix: coding for coding, suffix in _CODINGS.items()}
        for path in sorted(folder.rglob("*")):
            coding = suffixes.get(path.suffix)
            plain = path.with_suffix("") if coding else path
            if path.is_file() and plain.is_file():
                media_type = _TYPES.get(plain.suffix) or mimetypes.guess_type(plain.name)[0]
                digest = sha256_of(path, max_bytes=MAX_FILE_BYTES)
                form = PageFile(path, media_type or "application/octet-stream", coding, digest)
                self._forms.setdefault(plain.relative_to(folder).as_posix(), {})[coding] = form

    def find(self, place: str, accepted: str) -> PageFile | None:
        """The smallest form of a file that a browser takes; None if there is no such file.

        Args:
            place: Path in the page; empty for its index.
            accepted: Compressions that the browser takes, as it lists them.
        """
        forms = self._forms.get(place or INDEX, {})
        names = {part.partition(";")[0].strip() for part in accepted.split(",")}
        for coding in _CODINGS:
            if coding in names and coding in forms:
                return forms[coding]
        return forms.get(None)
