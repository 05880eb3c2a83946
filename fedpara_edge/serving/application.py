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
| `GET /operator/state`        | operator | rounds and devices (`overview`), at once or when they change             |
| `POST /operator/pause`,      | operator | asks no device to train from now on, goes on, closes the round           |
| `resume`, `close`            |          |                                                                          |
| `GET /metrics`               | operator | what the server counts, for Prometheus                                   |

Who asks shows a token (`tokens`) as `Authorization: Bearer …`. Updates in pieces follow the IETF's draft "Resumable
Uploads for HTTP" (draft-ietf-httpbis-resumable-upload, revision 05 and later): an upload is begun by a POST with
`Upload-Complete: ?0`, continued by PATCH with `Upload-Offset` and the type `application/partial-upload`, and its last
piece has `Upload-Complete: ?1`. A POST without these fields is an update in one piece. Where the task names a run, the
request that completes an update has its envelope (`fedpara_edge.trust.envelope`) in base64 in the field
`Update-Envelope`. A refusal is a sentence of plain text; 429 and 503 say after how many seconds to try again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from fedpara_edge.errors import FedparaError
from fedpara_edge.serving.access import Access
from fedpara_edge.serving.answers import of_file, refused
from fedpara_edge.serving.bell import Bell, wait_for
from fedpara_edge.serving.config import ServeConfig
from fedpara_edge.serving.events import OnEvent, ignore
from fedpara_edge.serving.federation import Federation
from fedpara_edge.serving.operator import Operator
from fedpara_edge.serving.page import Page
from fedpara_edge.serving.record import Record
from fedpara_edge.serving.refused import RefusedError
from fedpara_edge.serving.requests import is_complete, number_in, pieces, read_envelope, read_join, wait_seconds
from fedpara_edge.serving.rounds import envelope_of
from fedpara_edge.serving.tokens import Tokens
from fedpara_edge.serving.uploads import Upload, Uploads

_MAX_JOIN_BYTES = 4096
_READERS = 4
"""Updates that are checked at the same time."""
_FOR_GOOD = "private, max-age=31536000, immutable"
_BYTES, _CERTIFICATE = "application/octet-stream", "application/x-x509-ca-cert"
_PARTIAL = "application/partial-upload"


class Application:
    """The application of a federation.

    Args:
        federation: Federation that runs.
        record: Record of its rounds.
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
        record: Record,
        uploads: Uploads,
        tokens: Tokens,
        config: ServeConfig,
        *,
        page: Page | None = None,
        authority: Path | None = None,
        on_event: OnEvent = ignore,
    ) -> None:
        self._federation, self._record, self._uploads, self._page = federation, record, uploads, page
        self._tokens, self._tell, self._authority = tokens, on_event, authority
        self._access = Access(tokens, config.requests_per_minute, on_event)
        self._bell, self._work, self._ended = Bell(), asyncio.Event(), asyncio.Event()
        self._operator = Operator(federation, record, self._access, on_change=self._work.set)
        self._loop: asyncio.AbstractEventLoop | None = None
        answering = self._access.answering
        routes = [
            Route("/healthz", answering(self._health)),
            Route("/ca.pem", answering(self._ca)),
            *self._operator.routes,
            Route("/join", answering(self._join), methods=["POST"]),
            Route("/task.json", answering(self._task)),
            Route("/files/{place:path}", answering(self._file)),
            Route("/updates", answering(self._post), methods=["POST"]),
            Route("/updates/{name}", answering(self._head), methods=["HEAD"]),
            Route("/updates/{name}", answering(self._patch), methods=["PATCH"]),
            Route("/updates/{name}", answering(self._delete), methods=["DELETE"]),
            Route("/{place:path}", answering(self._of_page)),
        ]
        handlers = {HTTPException: _refuse_route}
        self.asgi = Starlette(routes=routes, lifespan=self._lifespan, exception_handlers=handlers)

    def end(self) -> None:
        """Have requests that wait answer now, as the server is about to end."""
        self._ended.set()
        self._operator.is_ended = True
        self._operator.bell.ring()
        self._wake()

    def look(self) -> None:
        """Have those who watch look again; from any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._operator.bell.ring)

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        loop = self._loop = asyncio.get_running_loop()
        self._readers = anyio.CapacityLimiter(_READERS)

        def wake() -> None:
            loop.call_soon_threadsafe(self._wake)

        self._federation.listeners.append(wake)
        running = [asyncio.create_task(each) for each in (self._tick(), self._keep_record())]
        yield
        self._loop = None
        self._record.stop()
        for task in running:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    def _wake(self) -> None:
        """Have everybody who waits for a change look again."""
        self._bell.ring()
        self._work.set()

    async def _tick(self) -> None:
        """Close rounds when it is time, and aggregate them; notice within a second that the list of clients changed."""
        while not self._ended.is_set():
            self._work.clear()
            self._federation.look_at_list()
            left = self._federation.seconds_left()
            if left == 0:
                self._federation.close()
            await anyio.to_thread.run_sync(self._federation.advance)
            if left != 0:
                await wait_for(self._work, min(1.0 if left is None else left, 1.0))

    async def _keep_record(self) -> None:
        """Have the record catch up with the rounds."""
        while not self._ended.is_set():
            changed = self._bell.next
            number, devices = self._federation.number, len(self._federation.devices)
            try:
                await anyio.to_thread.run_sync(self._record.catch_up, number, devices)
            except FedparaError as error:
                self._tell("error", level=logging.ERROR, code=error.code, message=str(error))
            if not self._ended.is_set():
                await changed.wait()

    def _allow_device(self, request: Request) -> str:
        """The name of the device that asks.

        Raises:
            RefusedError: It has no valid token, or did not join this federation.
        """
        client = self._access.allow(request, "device")
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

    async def _join(self, request: Request) -> Response:
        self._access.allow(request, "join")
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
            changed = self._bell.next
            task = self._federation.task(client)
            left = deadline - loop.time()
            if task.train or task.phase == "finished" or left <= 0 or self._ended.is_set():
                return JSONResponse(task.to_json(), headers={"Cache-Control": "no-store"})
            await wait_for(changed, left)

    async def _file(self, request: Request) -> Response:
        self._allow_device(request)
        place = request.path_params["place"]
        path = self._federation.current.content.find(place)
        if path is None:
            raise RefusedError("expected a file of this round, found none; get the task again", status=404)
        counted = self._federation.note_sent if self._federation.current.content.is_counted(place) else None
        return of_file(request, path, digest=place, caching=_FOR_GOOD, media_type=_BYTES, on_sent=counted)

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
                self._access.measures.count("received_bytes_total", by=len(piece))
                self._uploads.append(upload, writer, piece)
        except RefusedError as error:
            if error.status != 409:
                self._uploads.remove(upload.id)
                raise
            return refused(str(error), error.status, _state_of(upload))
        if not complete:
            return Response(status_code=status, headers=_state_of(upload))
        try:
            self._uploads.check_complete(upload)
            if (envelope := read_envelope(request)) is not None:
                envelope_of(upload.content).write_bytes(envelope)
            take = partial(self._federation.take, upload.content, upload.client)
            receipt = await anyio.to_thread.run_sync(take, limiter=self._readers)
        except RefusedError as error:
            if error.status < 500:
                self._access.measures.count("updates_total", 'outcome="refused"')
                self._uploads.remove(upload.id)
                raise
            return refused(str(error), error.status, _state_of(upload))
        self._uploads.remove(upload.id)
        self._access.measures.count("updates_total", f'outcome="{"taken" if receipt.is_new else "again"}"')
        self._work.set()
        return JSONResponse({"client": receipt.client, "round": receipt.round}, 201 if receipt.is_new else 200)

    async def _of_page(self, request: Request) -> Response:
        if self._page is None:
            raise RefusedError("expected an address of this server, found another; it hands out no page", status=404)
        file = self._page.find(request.path_params["place"], request.headers.get("Accept-Encoding", ""))
        if file is None:
            raise RefusedError("expected a file of the page, found none", status=404)
        response = of_file(request, file.path, digest=file.digest, caching="no-cache", media_type=file.media_type)
        response.headers["Vary"] = "Accept-Encoding"
        if file.coding is not None:
            response.headers["Content-Encoding"] = file.coding
        return response


async def _refuse_route(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return refused(f"{error.detail}: expected another request", error.status_code)


def _state_of(upload: Upload) -> dict[str, str]:
    """Fields that say how much of an upload is there."""
    fields = {"Location": f"/updates/{upload.id}", "Upload-Offset": str(upload.offset)}
    if upload.length is not None:
        fields["Upload-Length"] = str(upload.length)
    return {**fields, "Upload-Complete": "?0"}
