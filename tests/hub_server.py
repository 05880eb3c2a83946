"""A local stand-in of the Hugging Face Hub: the part of its HTTP interface that one commit and downloads need."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_of_the_test"
_RESOLVE = re.compile(r"/(?P<repository>[^/]+/[^/]+)/resolve/[^/]+/(?P<name>.+)")
_API = re.compile(r"/api/models/(?P<repository>[^/]+/[^/]+)(?P<rest>/.*)?")


class Hub:
    """Repositories with one version of their files.

    Attributes:
        repositories: Files by name, by repository.
        commits: Summary of each commit, with the repository.
        private: Repositories that were made private.
        tokens: Field `Authorization` of each request for something.
        instead: What it says, byte by byte, in place of its answer to a request, by the number of the request.
        requests: Number of requests so far.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.commits: list[tuple[str, str]] = []
        self.private: set[str] = set()
        self.tokens: list[str | None] = []
        self.address = ""
        self.instead: dict[int, bytes] = {}
        self.requests = 0

    def version(self, repository: str) -> str:
        return hashlib.sha1(f"{repository} {len(self.commits)}".encode()).hexdigest()

    def create(self, body: dict[str, Any]) -> tuple[int, Any]:
        repository = f"{body['organization']}/{body['name']}" if body.get("organization") else f"me/{body['name']}"
        if repository in self.repositories:
            return 409, {"url": f"{self.address}/{repository}"}
        self.repositories[repository] = {}
        if body.get("private") or body.get("visibility") == "private":
            self.private.add(repository)
        return 200, {"url": f"{self.address}/{repository}"}

    def commit(self, repository: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append((repository, value["summary"]))
            else:
                assert (line["key"], value["encoding"]) == ("file", "base64")
                self.repositories[repository][value["path"]] = base64.b64decode(value["content"])
        oid = self.version(repository)
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.address}/{repository}/commit/{oid}"}

    def about(self, repository: str) -> tuple[int, Any]:
        files = [{"rfilename": name} for name in self.repositories[repository]]
        return 200, {"id": repository, "sha": self.version(repository), "siblings": files, "private": False, "tags": []}


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _is_told_otherwise(self) -> bool:
        """Whether the answer to this request, which was read, is another, and was given."""
        number, self.hub.requests = self.hub.requests, self.hub.requests + 1
        if (said := self.hub.instead.get(number)) is None:
            return False
        self.close_connection = True
        with suppress(OSError):  # who asked has heard enough
            self.wfile.write(said.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
        return True

    def do_HEAD(self) -> None:
        if self._is_told_otherwise():
            return
        self._resolve(body=False)

    def do_GET(self) -> None:
        if self._is_told_otherwise():
            return
        self.hub.tokens.append(self.headers.get("Authorization"))
        found = _API.fullmatch(self.path.partition("?")[0])
        if found is None:
            self._resolve(body=True)
        elif found["repository"] not in self.hub.repositories:
            self._missing("RepoNotFound")
        else:
            self._answer(*self.hub.about(found["repository"]))

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        if self._is_told_otherwise():
            return
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            self._answer(*self.hub.create(json.loads(content)))
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif (found := _API.fullmatch(path)) is None or found["repository"] not in self.hub.repositories:
            self._missing("RepoNotFound")
        elif found["rest"].startswith("/preupload/"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(content)["files"]
            ]
            self._answer(200, {"files": files})
        else:
            assert found["rest"] == "/commit/main"
            self._answer(*self.hub.commit(found["repository"], [json.loads(line) for line in content.splitlines()]))

    def _resolve(self, *, body: bool) -> None:
        found = _RESOLVE.fullmatch(self.path.partition("?")[0])
        assert found is not None, self.path
        files = self.hub.repositories.get(found["repository"])
        if files is None:
            self._missing("RepoNotFound")
        elif found["name"] not in files:
            self._missing("EntryNotFound")
        else:
            content = files[found["name"]]
            fields = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": self.hub.version(found["repository"])}
            self._send(200, content, fields, body=body)

    def _missing(self, code: str) -> None:
        self._send(404, b"", {"X-Error-Code": code}, body=True)

    def _answer(self, status: int, value: Any) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"}, body=True)

    def _send(self, status: int, content: bytes, fields: dict[str, str], *, body: bool) -> None:
        self.send_response(status)
        for name, value in {**fields, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            with suppress(OSError):  # who asked has seen enough
                self.wfile.write(content)


@contextmanager
def serving_hub() -> Iterator[Hub]:
    """A Hub at its `address`, for as long as the context lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
