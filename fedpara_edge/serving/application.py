"""The server's surface: what devices, pages and monitoring ask over HTTP, as an ASGI application.

| request                      | token    | answer                                                                   |
|------------------------------|----------|--------------------------------------------------------------------------|
| `GET /` and files below      | none     | the page for phones                                                      |
| `POST /join`                 | join     | `{"client", "token"}`: name of the device, and the token for all it asks |
| `GET /task.json`             | device   | the task (`formats.task`), at once or, with `Prefer: wait=N` (RFC 7240), |
|                              |          | when the device is to train, but after N seconds at the latest           |
| `GET /files/…`               | device   | a file that never changes, in ranges if asked for                        |
| `POST /updates`              | device   | takes an update, or begins one that comes in pieces                      |
| `HEAD`, `PATCH` and `DELETE` | device   | tells how much of such an update is there, adds a piece, forgets it      |
| `/updates/<id>`              |          |                                                                          |
| `GET /healthz`               | none     | 200, or 503 with the reason why rounds can't go on                       |
| `GET /ca.pem`                | none     | certificate that vouches for the server, where it made its own           |
| `GET /operator`              | none     | the operator's page, which asks for what follows with its token          |
| `GET /operator/state`        | operator | rounds and devices (`overview`)                                          |
| `POST /operator/pause`,      | operator | asks no device to train from now on, goes on, closes the round           |
| `resume`, `close`            |          |                                                                          |
| `GET /metrics`               | operator | what the server counts, for Prometheus                                   |

Who asks shows a token (`tokens`) as `Authorization: Bearer …`. Updates in pieces follow the IETF's draft "Resumable
Uploads for HTTP" (draft-ietf-httpbis-resumable-upload, revision 05 and later): an upload is begun by a POST with
`Upload-Complete: ?0`, continued by PATCH with `Upload-Offset` and the type `application/partial-upload`, and its last
piece has `Upload-Complete: ?1`. A POST without these fields is an update in one piece. A refusal is a sentence of plain
text; 429 and 503 say after how many seconds to try again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from fedpara_edge.errors import FedparaError
from fedpara_edge.serving.config import ServeConfig
from fedpara_edge.serving.federation import ALIVE_SECONDS, Federation, OnEvent, ignore
from fedpara_edge.serving.limits import Rates
from fedpara_edge.serving.measures import Measures
from fedpara_edge.serving.overview import overview
from fedpara_edge.serving.page import POLICY, Page
from fedpara_edge.serving.refused import RefusedError
from fedpara_edge.serving.requests import is_complete, number_in, pieces, read_join, wait_seconds
from fedpara_edge.serving.tokens import Kind, Tokens
from fedpara_edge.serving.uploads import Upload, Uploads

OPERATOR = Path(__file__).with_name("operator_page")
"""Folder of the operator's page."""
Handler = Callable[[Request], Awaitable[Response]]

RETRY_SECONDS = 2
_MAX_JOIN_BYTES = 4096
_READERS = 4
"""Updates that are checked at the same time."""
_FOR_GOOD = "private, max-age=31536000, immutable"
_CERTIFICATE = "application/x-x509-ca-cert"
_PARTIAL = "application/partial-upload"
_HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class Application:
    """The application of a federation.

    Args:
        federation: Federation that runs.
        uploads: Updates that are arriving.
        tokens: Tokens of the server.
        config: Limits.
        page: Page for phones; None to hand out none.
        authority: Certificate that devices are to trust, PEM; None for none of the server's own.
        on_event: Function that is told what happens.

    Attributes:
        asgi: The application, for a server of ASGI.
    """

    def __init__(
        self,
        federation: Federation,
        uploads: Uploads,
        tokens: Tokens,
        config: ServeConfig,
        *,
        page: Page | None = None,
        authority: Path | None = None,
        on_event: OnEvent = ignore,
    ) -> None:
        self._federation, self._uploads, self._tokens, self._page = federation, uploads, tokens, page
        self._operator = Page(OPERATOR)
        self._rates = Rates(config.requests_per_minute, time.monotonic)
        self._measures, self._tell, self._authority = Measures(), on_event, authority
        self._changed, self._work = asyncio.Event(), asyncio.Event()
        self._ended = asyncio.Event()
        routes = [
            Route("/healthz", self._answer(self._health)),
            Route("/ca.pem", self._answer(self._ca)),
            Route("/metrics", self._answer(self._metrics)),
            Route("/operator", self._answer(self._operator_page)),
            Route("/operator/state", self._answer(self._overview)),
            Route("/operator/{name:str}", self._answer(self._operator_file)),
            Route("/operator/{what:str}", self._answer(self._operate), methods=["POST"]),
            Route("/join", self._answer(self._join), methods=["POST"]),
            Route("/task.json", self._answer(self._task)),
            Route("/files/{place:path}", self._answer(self._file)),
            Route("/updates", self._answer(self._post), methods=["POST"]),
            Route("/updates/{name}", self._answer(self._head), methods=["HEAD"]),
            Route("/updates/{name}", self._answer(self._patch), methods=["PATCH"]),
            Route("/updates/{name}", self._answer(self._delete), methods=["DELETE"]),
            Route("/{place:path}", self._answer(self._of_page)),
        ]
        refused = {HTTPException: _refuse_route}
        self.asgi = Starlette(routes=routes, lifespan=self._lifespan, exception_handlers=refused)

    def end(self) -> None:
        """Have requests that wait answer now, as the server is about to end."""
        self._ended.set()
        self._changed.set()
        self._work.set()

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        self._readers = anyio.CapacityLimiter(_READERS)

        def wake() -> None:
            loop.call_soon_threadsafe(self._wake)

        self._federation.listeners.append(wake)
        ticking = asyncio.create_task(self._tick())
        yield
        ticking.cancel()
        with suppress(asyncio.CancelledError):
            await ticking

    def _wake(self) -> None:
        """Have everybody who waits for a change look again."""
        self._changed.set()
        self._changed = asyncio.Event()
        self._work.set()

    async def _tick(self) -> None:
        """Close rounds when it is time, and aggregate them."""
        while not self._ended.is_set():
            self._work.clear()
            left = self._federation.seconds_left()
            if left == 0:
                self._federation.close()
            await anyio.to_thread.run_sync(self._federation.advance)
            if left != 0:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._work.wait(), min(1.0 if left is None else left, 1.0))

    def _answer(self, handler: Handler) -> Handler:
        """A handler whose errors become answers, and whose answers are counted."""

        async def answer(request: Request) -> Response:
            try:
                response = await handler(request)
            except RefusedError as error:
                response = _refused(str(error), error.status)
            except (ClientDisconnect, TimeoutError):
                response = _refused("expected the rest of the request, found none; send it again", 408)
            except (FedparaError, OSError) as error:
                self._tell("error", level=logging.ERROR, code=getattr(error, "code", "disk"), message=str(error))
                response = _refused("expected a server that can write, found it can't now; try again later", 503)
            for name, value in _HEADERS.items():
                response.headers.setdefault(name, value)
            self._measures.count("requests_total", f'status="{response.status_code}"')
            return response

        return answer

    def _allow(self, request: Request, kind: Kind) -> str:
        """The subject of the request's token, whose request is counted.

        Raises:
            RefusedError: It has no valid token of the kind, or made too many requests.
        """
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        subject = self._tokens.subject(kind, token.strip(), now=time.time()) if scheme.lower() == "bearer" else None
        if subject is None:
            self._rates.spend(f"address {request.client.host if request.client else ''}")
            remedy = {"join": "ask for a new join link", "device": "join again", "operator": "use the operator's"}[kind]
            raise RefusedError(f"expected a token of kind {kind} that is still good, found none; {remedy}", status=401)
        if kind != "join":
            self._rates.spend(f"{kind} {subject}")
        return subject

    def _allow_device(self, request: Request) -> str:
        """The name of the device that asks.

        Raises:
            RefusedError: It has no valid token, or did not join this federation.
        """
        client = self._allow(request, "device")
        if client not in self._federation.devices:
            raise RefusedError("expected a device that joined, found another; join again", status=401)
        return client

    async def _health(self, _: Request) -> Response:
        error = self._federation.error
        return PlainTextResponse("ok\n" if error is None else f"{error}\n", 200 if error is None else 503)

    async def _ca(self, _: Request) -> Response:
        if self._authority is None:
            raise RefusedError("expected a server with an authority of its own, found one without", status=404)
        return FileResponse(self._authority, headers={"Cache-Control": "no-cache"}, media_type=_CERTIFICATE)

    async def _metrics(self, request: Request) -> Response:
        self._allow(request, "operator")
        federation = self._federation
        gauges = {
            "round": federation.number,
            "round_updates": federation.round.count,
            "round_asked": len(federation.round.asked),
            "devices": len(federation.devices),
            "devices_alive": len(federation.devices.seen_since(time.time() - ALIVE_SECONDS)),
            "paused": int(federation.phase == "paused"),
            "failed": int(federation.error is not None),
        }
        return PlainTextResponse(self._measures.text(gauges), media_type="text/plain; version=0.0.4")

    async def _operator_page(self, request: Request) -> Response:
        return self._of_operator(request, "")

    async def _operator_file(self, request: Request) -> Response:
        return self._of_operator(request, request.path_params["name"])

    def _of_operator(self, request: Request, name: str) -> Response:
        """A file of the operator's page, which has nothing in it before the token is shown."""
        file = self._operator.find(name, "")
        if file is None:
            raise RefusedError("expected a file of the operator's page, found none", status=404)
        return _of_file(request, file.path, digest=file.digest, caching="no-cache", media_type=file.media_type)

    async def _overview(self, request: Request) -> Response:
        self._allow(request, "operator")
        found = await anyio.to_thread.run_sync(partial(overview, self._federation, now=time.time()))
        return JSONResponse(found, headers={"Cache-Control": "no-store"})

    async def _operate(self, request: Request) -> Response:
        self._allow(request, "operator")
        actions: dict[str, Callable[[], None]] = {
            "pause": partial(self._federation.pause, True),
            "resume": partial(self._federation.pause, False),
            "close": self._federation.close,
        }
        action = actions.get(request.path_params["what"])
        if action is None:
            raise RefusedError(f"expected {', '.join(actions)}, found something else", status=404)
        await anyio.to_thread.run_sync(action)
        self._work.set()
        return Response(status_code=204)

    async def _join(self, request: Request) -> Response:
        self._allow(request, "join")
        body = b""
        async for piece in pieces(request):
            body += piece
            if len(body) > _MAX_JOIN_BYTES:
                raise RefusedError(f"expected at most {_MAX_JOIN_BYTES} bytes, found more", status=413)
        client, proof = read_join(body)
        await anyio.to_thread.run_sync(partial(self._federation.devices.join, client, proof, now=time.time()))
        self._tell("device_joined", client=client)
        return JSONResponse({"client": client, "token": self._tokens.make("device", client)}, 201)

    async def _task(self, request: Request) -> Response:
        client = self._allow_device(request)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_seconds(request.headers.get("Prefer", ""))
        while True:
            changed = self._changed
            task = self._federation.task(client)
            left = deadline - loop.time()
            if task.train or task.phase == "finished" or left <= 0 or self._ended.is_set():
                return JSONResponse(task.to_json(), headers={"Cache-Control": "no-store"})
            with suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), left)

    async def _file(self, request: Request) -> Response:
        self._allow_device(request)
        place = request.path_params["place"]
        path = self._federation.content.find(place)
        if path is None:
            raise RefusedError("expected a file of this round, found none; get the task again", status=404)
        return _of_file(request, path, digest=place, caching=_FOR_GOOD, media_type="application/octet-stream")

    async def _post(self, request: Request) -> Response:
        client = self._allow_device(request)
        complete = is_complete(request, default=True)
        length = number_in(request, "Upload-Length", None)
        if complete:
            length = number_in(request, "Content-Length", length)
        upload = self._uploads.begin(client, length)
        return await self._receive(request, upload, 0, complete, status=201)

    async def _head(self, request: Request) -> Response:
        upload = self._uploads.find(request.path_params["name"], self._allow_device(request))
        return Response(status_code=204, headers={**_state_of(upload), "Cache-Control": "no-store"})

    async def _patch(self, request: Request) -> Response:
        upload = self._uploads.find(request.path_params["name"], self._allow_device(request))
        if request.headers.get("Content-Type") != _PARTIAL:
            raise RefusedError(f"expected the type {_PARTIAL}, found another", status=415)
        offset = number_in(request, "Upload-Offset", None)
        if offset is None:
            raise RefusedError("expected the field Upload-Offset, found none", status=400)
        return await self._receive(request, upload, offset, is_complete(request, default=False), status=204)

    async def _delete(self, request: Request) -> Response:
        upload = self._uploads.find(request.path_params["name"], self._allow_device(request))
        self._uploads.remove(upload.id)
        return Response(status_code=204)

    async def _receive(self, request: Request, upload: Upload, offset: int, complete: bool, *, status: int) -> Response:
        """Add the body of a request to an upload, and take the update if it is complete with it."""
        try:
            writer = self._uploads.take_over(upload, offset)
            async for piece in pieces(request):
                self._measures.count("received_bytes_total", by=len(piece))
                self._uploads.append(upload, writer, piece)
        except RefusedError as error:
            if error.status != 409:
                self._uploads.remove(upload.id)
                raise
            return _refused(str(error), error.status, _state_of(upload))
        if not complete:
            return Response(status_code=status, headers=_state_of(upload))
        try:
            self._uploads.check_complete(upload)
            take = partial(self._federation.take, upload.content, upload.client)
            receipt = await anyio.to_thread.run_sync(take, limiter=self._readers)
        except RefusedError as error:
            if error.status < 500:
                self._measures.count("updates_total", 'outcome="refused"')
                self._uploads.remove(upload.id)
                raise
            return _refused(str(error), error.status, _state_of(upload))
        self._uploads.remove(upload.id)
        self._measures.count("updates_total", f'outcome="{"taken" if receipt.is_new else "again"}"')
        self._work.set()
        return JSONResponse({"client": receipt.client, "round": receipt.round}, 201 if receipt.is_new else 200)

    async def _of_page(self, request: Request) -> Response:
        if self._page is None:
            raise RefusedError("expected an address of this server, found another; it hands out no page", status=404)
        file = self._page.find(request.path_params["place"], request.headers.get("Accept-Encoding", ""))
        if file is None:
            raise RefusedError("expected a file of the page, found none", status=404)
        response = _of_file(request, file.path, digest=file.digest, caching="no-cache", media_type=file.media_type)
        response.headers["Vary"] = "Accept-Encoding"
        if file.coding is not None:
            response.headers["Content-Encoding"] = file.coding
        return response


async def _refuse_route(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _refused(f"{error.detail}: expected another request", error.status_code)


def _refused(message: str, status: int, headers: dict[str, str] | None = None) -> Response:
    more = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    if status in (429, 503):
        more["Retry-After"] = str(RETRY_SECONDS)
    if status in (408, 413):
        more["Connection"] = "close"  # the rest of the body is not read
    return PlainTextResponse(f"{message}\n", status, {**more, **_HEADERS, **(headers or {})})


def _of_file(request: Request, path: Path, *, digest: str, caching: str, media_type: str) -> Response:
    headers = {"ETag": f'"{digest}"', "Cache-Control": caching}
    if request.headers.get("If-None-Match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return FileResponse(path, headers=headers, media_type=media_type)


def _state_of(upload: Upload) -> dict[str, str]:
    """Fields that say how much of an upload is there."""
    fields = {"Location": f"/updates/{upload.id}", "Upload-Offset": str(upload.offset)}
    if upload.length is not None:
        fields["Upload-Length"] = str(upload.length)
    return {**fields, "Upload-Complete": "?0"}
