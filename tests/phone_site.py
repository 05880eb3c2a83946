"""A web server on this machine with the page, a bundle and a task, which takes updates; for tests alone."""

from __future__ import annotations

import json
import mimetypes
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}


@dataclass
class Site:
    """The server: what it hands out, and what it was sent.

    Args:
        page: Folder of the page, as `build.mjs --compress` writes it; handed out in brotli.
        files: Files beside those of the page, by path.
        updates: Updates that were sent, in the order of their arrival.
        refusals: Status and sentence with which each of the next updates is refused.
    """

    page: Path
    files: dict[str, bytes] = field(default_factory=dict)
    updates: list[bytes] = field(default_factory=list)
    refusals: list[tuple[int, str]] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://localhost:{self.port}/"

    def hand_out(self, folder: str, path: Path) -> None:
        """Hand out all files of a folder of the disk."""
        for file in path.iterdir():
            self.files[f"/{folder}/{file.name}"] = file.read_bytes()

    def ask_for(self, task: Mapping[str, Any]) -> None:
        """Set the task of the round."""
        self.files["/task.json"] = json.dumps(task).encode()


@contextmanager
def serving(site: Site) -> Iterator[Site]:
    """Serve a site while the context lasts."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            file = site.page / path.lstrip("/") / ("index.html" if path.endswith("/") else "")
            content = site.files.get(path) or (
                file.with_name(f"{file.name}.br").read_bytes() if file.is_file() else None
            )
            kind = TYPES.get(file.suffix) or mimetypes.guess_type(file.name)[0] or "application/octet-stream"
            coding = {} if path in site.files or content is None else {"Content-Encoding": "br"}
            self._answer(404 if content is None else 200, content or b"", kind, coding)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if not site.refusals:
                site.updates.append(body)
            status, sentence = site.refusals.pop(0) if site.refusals else (200, "")
            self._answer(status, sentence.encode(), "text/plain", {})

        def _answer(self, status: int, content: bytes, kind: str, further: Mapping[str, str]) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            for name, value in {"Content-Security-Policy": POLICY, **further}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("localhost", 0), Handler)
    site.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
