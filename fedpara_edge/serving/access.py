"""Access to a server: whose token is good, how often who may ask, and what every answer has in common."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from fedpara_edge.errors import FedparaError
from fedpara_edge.serving.answers import HEADERS, refused
from fedpara_edge.serving.events import OnEvent
from fedpara_edge.serving.limits import Rates
from fedpara_edge.serving.measures import Measures
from fedpara_edge.serving.refused import RefusedError
from fedpara_edge.serving.tokens import Kind, Tokens

Handler = Callable[[Request], Awaitable[Response]]


class Access:
    """Access to a server.

    Args:
        tokens: Tokens of the server.
        requests_per_minute: Most requests of one device, or of an address without a valid token.
        on_event: Function that is told what happens.

    Attributes:
        measures: Counters of the server.
    """

    def __init__(self, tokens: Tokens, requests_per_minute: int, on_event: OnEvent) -> None:
        self._tokens, self._tell = tokens, on_event
        self._rates = Rates(requests_per_minute, time.monotonic)
        self.measures = Measures()

    def answering(self, handler: Handler) -> Handler:
        """A handler whose errors become answers, and whose answers are counted."""

        async def answer(request: Request) -> Response:
            try:
                response = await handler(request)
            except RefusedError as error:
                response = refused(str(error), error.status)
            except (ClientDisconnect, TimeoutError):
                response = refused("expected the rest of the request, found none; send it again", 408)
            except (FedparaError, OSError) as error:
                self._tell("error", level=logging.ERROR, code=getattr(error, "code", "disk"), message=str(error))
                response = refused("expected a server that can write, found it can't now; try again later", 503)
            for name, value in HEADERS.items():
                response.headers.setdefault(name, value)
            self.measures.count("requests_total", f'status="{response.status_code}"')
            return response

        return answer

    def allow(self, request: Request, kind: Kind) -> str:
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
