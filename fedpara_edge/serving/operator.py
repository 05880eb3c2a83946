"""The operator's part of a server: its page, what the page shows and does, and measures for Prometheus.

What the page shows comes with an ETag. With `If-None-Match` and `Prefer: wait=N` (RFC 7240) the answer comes when
something else is to be shown, or after N seconds, so that the page is up to date without asking all the time.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import anyio
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from fedpara_edge.serving.access import Access
from fedpara_edge.serving.answers import of_file
from fedpara_edge.serving.asking import ALIVE_SECONDS
from fedpara_edge.serving.bell import Bell, wait_for
from fedpara_edge.serving.federation import Federation
from fedpara_edge.serving.overview import overview
from fedpara_edge.serving.page import Page
from fedpara_edge.serving.record import Record
from fedpara_edge.serving.refused import RefusedError
from fedpara_edge.serving.requests import wait_seconds

PAGE = Path(__file__).with_name("operator_page")
"""Folder of the operator's page."""
LOOK_SECONDS = 5.0
"""Time after which to look again whether devices are still here."""
CALM_SECONDS = 0.5
"""Time for which news are gathered, so that many at once are one answer."""


class Operator:
    """The operator's part of a server.

    Args:
        federation: Federation that runs.
        record: Record of its rounds.
        access: Access to the server.
        on_change: Function that is called when the operator has changed something.

    Attributes:
        bell: Bell that rings when there is something new to show.
        is_ended: Whether requests are to wait no longer.
    """

    def __init__(
        self, federation: Federation, record: Record, access: Access, *, on_change: Callable[[], None]
    ) -> None:
        self._federation, self._record, self._access, self._on_change = federation, record, access, on_change
        self._page = Page(PAGE)
        self.bell = Bell()
        self.is_ended = False

    @property
    def routes(self) -> list[Route]:
        """What is answered, by address."""
        answering = self._access.answering
        return [
            Route("/metrics", answering(self._metrics)),
            Route("/operator", answering(self._of_page)),
            Route("/operator/state", answering(self._state)),
            Route("/operator/{name:str}", answering(self._of_page)),
            Route("/operator/{what:str}", answering(self._operate), methods=["POST"]),
        ]

    async def _of_page(self, request: Request) -> Response:
        """A file of the page, which has nothing in it before the token is shown."""
        file = self._page.find(request.path_params.get("name", ""), "")
        if file is None:
            raise RefusedError("expected a file of the operator's page, found none", status=404)
        return of_file(request, file.path, digest=file.digest, caching="no-cache", media_type=file.media_type)

    async def _state(self, request: Request) -> Response:
        self._access.allow(request, "operator")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_seconds(request.headers.get("Prefer", ""))
        known = request.headers.get("If-None-Match")
        while True:
            news = self.bell.next
            found = await anyio.to_thread.run_sync(partial(overview, self._federation, self._record, now=time.time()))
            content = json.dumps(found).encode()
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"', "Cache-Control": "no-store"}
            left = deadline - loop.time()
            if headers["ETag"] != known:
                return Response(content, headers=headers, media_type="application/json")
            if left <= 0 or self.is_ended:
                return Response(status_code=304, headers=headers)
            await wait_for(news, min(left, LOOK_SECONDS))
            await asyncio.sleep(min(left, CALM_SECONDS))

    async def _operate(self, request: Request) -> Response:
        self._access.allow(request, "operator")
        actions: dict[str, Callable[[], None]] = {
            "pause": partial(self._federation.pause, True),
            "resume": partial(self._federation.pause, False),
            "close": self._federation.close,
        }
        action = actions.get(request.path_params["what"])
        if action is None:
            raise RefusedError(f"expected {', '.join(actions)}, found something else", status=404)
        await anyio.to_thread.run_sync(action)
        self._on_change()
        return Response(status_code=204)

    async def _metrics(self, request: Request) -> Response:
        self._access.allow(request, "operator")
        federation, rounds = self._federation, self._record.rounds
        scores = {
            name: next((each[name] for each in reversed(rounds) if each[name] is not None), None)
            for name in ("accuracy", "loss")
        }
        gauges = {
            "round": federation.number,
            "round_updates": federation.round.count,
            "round_asked": len(federation.round.asked),
            "devices": len(federation.devices),
            "devices_alive": len(federation.devices.seen_since(time.time() - ALIVE_SECONDS)),
            "paused": int(federation.phase == "paused"),
            "failed": int(federation.error is not None),
            **{name: value for name, value in scores.items() if value is not None},
        }
        return PlainTextResponse(self._access.measures.text(gauges), media_type="text/plain; version=0.0.4")
