"""Requests to one server, each on a connection of its own, with what may go wrong told apart.

A server that can't be reached, is overloaded or asks for patience (statuses 408, 429 and from 500 on) raises
`UnreachableError`: the same request may succeed later. All other answers are returned.
"""

from __future__ import annotations

import http.client
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO
from urllib.parse import urlsplit

from fedpara_edge._version import __version__
from fedpara_edge.errors import FedparaError, InputError, brief_text
from fedpara_edge.storage.arriving import TooSlowError, arriving

TIMEOUT_SECONDS = 30.0
MAX_ANSWER_BYTES = 16 << 20
"""Longest answer that is read into memory."""
LONGEST_WAIT_SECONDS = 3600.0
"""Longest time to wait that a server may ask for."""
_PIECE_BYTES = 1 << 16


class UnreachableError(FedparaError):
    """A server gave no answer, or asked for patience: exit code 1.

    Args:
        message: Object, expectation, finding and remedy, in one line.
        after_seconds: Time for which the server asks to wait; None if it does not say.
    """

    def __init__(self, message: str, *, after_seconds: float | None = None) -> None:
        super().__init__(message, code="unreachable")
        self.after_seconds = after_seconds


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer that was read whole.

    Args:
        status: Status of HTTP.
        headers: Fields by name in lower case.
        content: Body.
    """

    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def sentence(self) -> str:
        """What the server says, in a line."""
        return brief_text(self.content.decode("utf-8", "replace").strip(), max_length=300)


class Connection:
    """A way to a server.

    Args:
        url: Address of the server, http or https.
        context: TLS settings; None for those of the system.

    Raises:
        InputError: The address is none.
    """

    def __init__(self, url: str, *, context: ssl.SSLContext | None = None) -> None:
        try:
            parts = urlsplit(url)
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError as error:
            raise InputError(f"{url}: expected an address such as https://host:8443/, found {error}") from error
        if parts.scheme not in ("http", "https") or not self._host:
            raise InputError(
                f"{url}: expected an address such as https://host:8443/, found another; take the join link"
            )
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}/"
        self._is_encrypted, self._context, self._prefix = parts.scheme == "https", context, parts.path.rstrip("/")
        self.token: str | None = None

    def request(
        self,
        method: str,
        place: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | IO[bytes] | None = None,
        timeout: float = TIMEOUT_SECONDS,
    ) -> Answer:
        """Ask for something that fits into memory.

        Args:
            method: Method of HTTP.
            place: Address below that of the server.
            headers: Further fields; `Content-Length` where the body is a file.
            body: Body.
            timeout: Longest time without a byte, in seconds.

        Raises:
            UnreachableError: There is no answer, or one that is too slow or asks for patience.
            TooMuchError: The answer does not fit.
        """
        with self.asking(method, place, headers=headers, body=body, timeout=timeout) as response:
            content = b"".join(pieces(response, name=self.url, max_bytes=MAX_ANSWER_BYTES))
            if response.length:
                raise UnreachableError(f"{self.url}: expected a whole answer, found it cut short; check the network")
            return Answer(status=response.status, headers=_fields(response), content=content)

    @contextmanager
    def asking(
        self,
        method: str,
        place: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | IO[bytes] | None = None,
        timeout: float = TIMEOUT_SECONDS,
    ) -> Iterator[http.client.HTTPResponse]:
        """As `request`, with an answer whose body is still to be read (`pieces`)."""
        authorization = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        fields = {"User-Agent": f"fedpara-edge/{__version__}", **authorization, **(headers or {})}
        path = f"{self._prefix}/{place.lstrip('/')}"
        connection = self._open(timeout)
        try:
            try:
                connection.request(method, path, body=body, headers=fields)
            except OSError:  # one of which, a certificate that is not trusted, is a ValueError as well
                raise
            except (ValueError, http.client.InvalidURL) as error:
                raise FedparaError(
                    f"{self.url}: expected addresses and tokens that fit into a request, found {brief_text(path)}; "
                    "the server has to be repaired"
                ) from error
            with connection.getresponse() as response:
                if response.status in (408, 429) or response.status >= 500:
                    raise self._overloaded(response)
                yield response
        except (OSError, http.client.HTTPException) as error:
            raise UnreachableError(
                f"{self.url}: expected an answer, found {_cause(error)}; check the network and the address"
            ) from error
        finally:
            connection.close()

    def _open(self, timeout: float) -> http.client.HTTPConnection:
        if self._is_encrypted:
            return http.client.HTTPSConnection(self._host, self._port, timeout=timeout, context=self._context)
        return http.client.HTTPConnection(self._host, self._port, timeout=timeout)

    def _overloaded(self, response: http.client.HTTPResponse) -> UnreachableError:
        after = response.headers.get("Retry-After", "")
        said = brief_text(response.read1(1000).decode("utf-8", "replace").strip(), max_length=300)
        return UnreachableError(
            f"{self.url}: expected a server with time for this device, found status {response.status}: {said}",
            after_seconds=min(float(after), LONGEST_WAIT_SECONDS) if after.isdecimal() else None,
        )


def pieces(response: http.client.HTTPResponse, *, name: str, max_bytes: int) -> Iterator[bytes]:
    """The body of an answer, piece by piece.

    Args:
        response: Answer.
        name: Name of the answer in errors.
        max_bytes: Largest size of the body.

    Raises:
        TooMuchError: There are more bytes.
        UnreachableError: They arrive too slowly.
    """
    read = iter(lambda: response.read1(_PIECE_BYTES), b"")
    try:
        yield from arriving(read, name=name, max_bytes=max_bytes, remedy="the server has to be repaired")
    except TooSlowError as error:
        raise UnreachableError(str(error)) from error


def _fields(response: http.client.HTTPResponse) -> dict[str, str]:
    return {name.lower(): value for name, value in response.headers.items()}


def _cause(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"a certificate that this device does not trust ({error.verify_message})"
    found = str(getattr(error, "strerror", None) or error)
    return brief_text(found, max_length=300) if found else type(error).__name__
