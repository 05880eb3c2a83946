"""Answers of a Hub that may say anything, to the client of huggingface_hub.

By itself that client waits for good, decodes what becomes any times as large, reads whatever comes, and asks again for
as long as a server tells it to. Here every answer, to its own functions and to ours, is taken as it is, within a limit,
not too slowly (`storage.arriving`), and encrypted where the address says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from fedpara_edge.errors import FedparaError, brief, brief_text
from fedpara_edge.storage.arriving import TooMuchError, arriving
from fedpara_edge.storage.wholefile import MAX_BYTES

TIMEOUT_SECONDS = 60.0
"""Time to wait for the next byte of an answer."""
MAX_ERRORS = 100
"""Most answers that tell of an error, in one command: huggingface_hub asks again after some of them."""
_MAX_ERROR_BYTES = 1 << 16
_REMEDY = "check HF_ENDPOINT"
_LIMIT = "fedpara_edge.limit"


@dataclass(frozen=True)
class Limit:
    """Bound on one answer.

    Args:
        max_bytes: Most bytes.
        remedy: Remedy for an answer that has more.
    """

    max_bytes: int = field(default_factory=lambda: MAX_BYTES)
    remedy: str = _REMEDY

    @property
    def extensions(self) -> dict[str, Any]:
        """Extensions of a request whose answer has this limit."""
        return {_LIMIT: self}


def bound_answers(endpoint: str) -> None:
    """Have huggingface_hub ask with a client whose answers are bounded, from now on in this process.

    Args:
        endpoint: Address of the Hub.
    """
    from huggingface_hub.utils import set_client_factory

    module, hooks = _module(), _hooks()
    bounds = _Bounds(endpoint)
    events = {"request": [*hooks, bounds.check_request], "response": [bounds.bound]}
    fields = {"Accept-Encoding": "identity"}  # what is decoded can be any times as large
    set_client_factory(
        lambda: module.Client(event_hooks=events, headers=fields, follow_redirects=True, timeout=TIMEOUT_SECONDS)
    )


def http_errors() -> tuple[type[Exception], ...]:
    """Errors of the client of huggingface_hub, which is a module of its own in some releases."""
    client = _module()
    return client.HTTPError, client.InvalidURL, client.StreamError


@contextmanager
def understanding(repository: str) -> Iterator[None]:
    """Have an answer that huggingface_hub does not understand be an error in one line.

    Args:
        repository: Name of the repository, for the error.

    Raises:
        FedparaError: It ended with an error that is none of its own.
    """
    from huggingface_hub.errors import HFValidationError

    known: tuple[type[BaseException], ...] = (FedparaError, HFValidationError, OSError, *http_errors())
    try:
        yield
    except known:
        raise
    except Exception as error:  # a stranger's answer decides which
        cause: BaseException = error
        while not isinstance(cause, known) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, known):  # of which some errors say only where it came up
            raise cause from None
        found = brief_text(" ".join(f"{type(cause).__name__}: {cause}".split()), max_length=200)
        raise FedparaError(
            f"{repository}: expected an answer as the Hub gives it, found one that can't be understood ({found}); "
            f"{_REMEDY}"
        ) from error


class _Bounds:
    """Bounds on the answers to one command.

    Args:
        endpoint: Address of the Hub.
    """

    def __init__(self, endpoint: str) -> None:
        self._is_encrypted = endpoint.lower().startswith("https:")
        self._errors = 0

    def check_request(self, request: Any) -> None:
        """Refuse to ask without encryption, wherever the Hub sends us.

        Raises:
            FedparaError: The request is not encrypted, and the Hub's address is.
        """
        if self._is_encrypted and request.url.scheme != "https":
            raise FedparaError(
                f"{_address(request)}: expected an address with encryption, found one without, to which the Hub leads; "
                "check the network"
            )

    def bound(self, answer: Any) -> None:
        """Bound an answer whose body is still to come.

        Raises:
            TooMuchError: It says that it is larger than its limit.
            FedparaError: It is compressed, or one error too many.
        """
        name, limit = _address(answer.request), answer.request.extensions.get(_LIMIT, Limit())
        if (encoding := answer.headers.get("Content-Encoding", "identity")) != "identity":
            raise FedparaError(f"{name}: expected an answer as it is, found one in {brief(encoding)}; check the Hub")
        if answer.status_code >= 300:
            self._bound_error(answer, name)
            return
        length = answer.headers.get("Content-Length", "")
        is_number = length.isascii() and length.isdecimal() and answer.request.method != "HEAD"
        if is_number and (len(length) > 18 or int(length) > limit.max_bytes):
            raise TooMuchError(
                f"{name}: expected at most {limit.max_bytes} bytes, found {length[:19]} announced; {limit.remedy}"
            )
        _read_through(answer, lambda body: arriving(body, name=name, max_bytes=limit.max_bytes, remedy=limit.remedy))

    def _bound_error(self, answer: Any, name: str) -> None:
        """Have an answer that is none end after its beginning, and not say how long to wait before the next one."""
        self._errors += answer.status_code >= 400
        if self._errors > MAX_ERRORS:
            raise FedparaError(
                f"{name}: expected at most {MAX_ERRORS} errors in one command, found more, the last with status "
                f"{answer.status_code}; try again later"
            )
        for wait in ("Retry-After", "RateLimit", "RateLimit-Policy"):
            answer.headers.pop(wait, None)

        def beginning(body: Iterator[bytes]) -> Iterator[bytes]:
            with suppress(TooMuchError):
                yield from arriving(body, name=name, max_bytes=_MAX_ERROR_BYTES, remedy=_REMEDY)

        _read_through(answer, beginning)


def _read_through(answer: Any, bounded: Callable[[Iterator[bytes]], Iterator[bytes]]) -> None:
    """Have the body of an answer be read through a function."""
    body = answer.stream

    class Stream(_module().SyncByteStream):  # type: ignore[misc]
        def __iter__(self) -> Iterator[bytes]:
            return bounded(iter(body))

        def close(self) -> None:
            body.close()

    answer.stream = Stream()


def _address(request: Any) -> str:
    """The address of a request without its query, which may have a secret."""
    return brief_text(str(request.url).partition("?")[0], max_length=200)


@cache
def _module() -> Any:
    """The module of the client that huggingface_hub has, which differs between its releases."""
    from huggingface_hub.utils import get_session

    return importlib.import_module(type(get_session()).__module__.partition(".")[0])


@cache
def _hooks() -> tuple[Callable[[Any], Any], ...]:
    """What huggingface_hub calls before each request."""
    from huggingface_hub.utils import get_session

    return tuple(get_session().event_hooks["request"])
