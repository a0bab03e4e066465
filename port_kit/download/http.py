"""HTTP for large files: keep-alive connections, timeouts on everything, bounded retries, prompt interruption.

The standard library's client reads a socket at twice the speed and half the processor time of httpx, which is what
decides the rate of a 46 GB file. Proxies (``HTTPS_PROXY``, ``ALL_PROXY``, ``NO_PROXY``) and certificate settings
(``SSL_CERT_FILE``, ``REQUESTS_CA_BUNDLE``) are honoured. Proxies that are reached by TLS or SOCKS are refused.
"""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.message import Message
from typing import TypeVar
from urllib.parse import SplitResult, urlsplit

from port_kit.download.urls import (
    Connection,
    TransportError,
    as_transport_error,
    follow_location,
    is_number,
    proxy_error,
    requested_wait,
    without_secrets,
)
from port_kit.errors import DownloadError
from port_kit.escape import reason_of

RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MOST_REDIRECTS = 5
_SMALLEST_SEGMENT, _LARGEST_SEGMENT = 16 << 20, 64 << 20
_ENOUGH = 1 << 16  # smaller pieces cost time for each: TLS delivers 16 KiB at once
_PATIENCE = 0.003  # seconds in which a piece may grow beyond that: little is lost when a connection breaks
_PAGE = 4096
_LONGEST_STEP = 0.5  # seconds
_T = TypeVar("_T")


class Interrupted(Exception):
    """The download was stopped. Never leaves this package."""


@dataclass(frozen=True)
class Policy:
    """Timeouts, retries and concurrency of requests.

    Attributes:
        connect_timeout: seconds for a connection.
        read_timeout: seconds of silence that are waited out, and in which 64 KiB must arrive.
        attempts: tries in a row without any progress.
        base: seconds before the second try; doubled each time, with jitter, up to ``longest``.
        longest: seconds of one wait at most; a server that asks for more ends the download.
        connections: requests at a time.
        files_at_once: files at a time.
        segment_size: bytes that one request asks for at most; a file up to this size comes with one request. Default:
            64 MiB, and no limit if there is one connection, which would only wait between requests.
    """

    connect_timeout: float = 10.0
    read_timeout: float = 30.0
    attempts: int = 6
    base: float = 0.5
    longest: float = 330.0
    connections: int = 8
    files_at_once: int = 4
    segment_size: int | None = None

    def pause(self, attempt: int) -> float:
        """Seconds before try number ``attempt`` + 1 (``attempt`` counts from 1)."""
        return min(self.longest, self.base * 2 ** (attempt - 1)) * random.uniform(0.75, 1.25)

    def segment_for(self, size: int) -> int:
        """Bytes a request for a file of ``size`` bytes: several for each connection, so that all end together."""
        most = self.segment_size or (max(size, _LARGEST_SEGMENT) if self.connections == 1 else _LARGEST_SEGMENT)
        if size <= most:
            return most
        return min(most, max(_SMALLEST_SEGMENT, size // (4 * self.connections)))


class Response:
    """The head of an answer, and its body piece by piece.

    Attributes:
        url: URL of the answer, after redirects.
        abort: breaks the connection off, from any thread.
    """

    def __init__(self, client: HttpClient, connection: Connection, raw: http.client.HTTPResponse, url: str) -> None:
        self._client, self._connection, self._raw = client, connection, raw
        self.url, self.status, self.headers, self.abort = url, raw.status, raw.headers, connection.abort
        length = raw.getheader("Content-Length")
        chunked = "chunked" in (raw.getheader("Transfer-Encoding") or "")
        known = length is not None and is_number(length) and len(length) < 19 and not chunked
        self.length: int | None = int(length or 0) if known else None
        self._rest = 0 if raw.length == 0 else self.length  # an answer to HEAD has a length, but no body

    def read_into(self, view: memoryview) -> int:
        """Fill the beginning of ``view`` with received bytes; return the count, 0 at the end of the body.

        Fills all of it if that takes no longer than ``_PATIENCE``, otherwise all but some pages. Returns with less
        than ``_ENOUGH`` bytes only at the body's end, or if the connection breaks: bytes received until then count,
        and the next call reports the break.

        Raises:
            TransportError: the connection broke, was silent for too long, or ended before ``Content-Length``.
        """
        whole, view = len(view), view if self._rest is None else view[: self._rest]
        if not view:
            self.close(reusable=True)
            return 0
        filled = self._fill(view, whole)
        if self._rest is not None:
            if not filled:
                raise TransportError(f"the connection ended {self._rest} bytes early")
            self._rest -= filled
        return filled

    def _fill(self, view: memoryview, whole: int) -> int:
        """Read until the view is full, enough bytes have arrived, the body ends, or the connection breaks."""
        begun = time.monotonic()
        filled = count = self._receive(view)
        while count and filled < len(view):
            wanted, waited = len(view), time.monotonic() - begun
            if filled < _ENOUGH and waited > self._client.policy.read_timeout:
                raise TransportError(f"only {filled} bytes arrived in {waited:.0f} s")
            if filled >= _ENOUGH and waited >= _PATIENCE:
                wanted = min(wanted, filled + (whole - filled) % _PAGE)
                if wanted == filled:
                    break
            try:
                count = self._receive(view[filled:wanted])
            except TransportError:
                break  # the next call meets it again
            filled += count
        return filled

    def _receive(self, view: memoryview) -> int:
        """One read of the socket; straight into ``view`` if the length is known."""
        if self._rest is not None:
            return as_transport_error(lambda: self._raw.fp.readinto1(view))
        piece = as_transport_error(lambda: self._raw.read1(len(view)))
        view[: len(piece)] = piece
        return len(piece)

    def read_all(self, limit: int = 1 << 26) -> bytes:
        """Return the complete body, which must not be longer than ``limit``."""
        body, buffer = bytearray(), memoryview(bytearray(_ENOUGH))
        while count := self.read_into(buffer):
            body += buffer[:count]
            if len(body) > limit:
                raise TransportError(f"a body of more than {limit} bytes where a short one is expected")
        self.close(reusable=self._rest == 0)
        return bytes(body)

    def close(self, reusable: bool = False) -> None:
        """Give the connection back, or drop it if the body was not read to its end."""
        self._raw.close()
        if not reusable or self._raw.will_close:
            self._client.drop(self._connection)

    def __enter__(self) -> Response:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(reusable=self._rest == 0)


class HttpClient:
    """Connections to any number of hosts, one a thread and host; all of them end at :meth:`stop`."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._open: dict[tuple[int, str, str], Connection] = {}
        self._stopped = threading.Event()

    @property
    def stopped(self) -> bool:
        """Return True if :meth:`stop` was called."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """End all exchanges now; threads that wait for bytes wake up with :class:`Interrupted`."""
        self._stopped.set()
        for connection in list(self._open.values()):
            connection.abort()

    def close(self) -> None:
        """Close all connections; no thread may use them any more."""
        for connection in list(self._open.values()):
            connection.close()
        self._open.clear()

    def sleep(self, seconds: float) -> None:
        """Wait, but not longer than until :meth:`stop`.

        Waits in short steps: Python handles a signal that arrives just before a wait begins only after that wait.
        """
        end = time.monotonic() + seconds
        while not self.stopped and (rest := end - time.monotonic()) > 0:
            self._stopped.wait(min(rest, _LONGEST_STEP))
        if self.stopped:
            raise Interrupted

    def request(
        self, method: str, url: str, headers_for: Callable[[str], Mapping[str, str]], *, follow: bool = True
    ) -> Response:
        """Ask, and follow redirects. ``headers_for`` is called for each hop, so that secrets stay with their host.

        Raises:
            TransportError: no answer, or a redirect that leads nowhere or from https to http.
            DownloadError: ``proxy`` if the proxy cannot be used, or refuses.
        """
        for _ in range(_MOST_REDIRECTS):
            response = self._exchange(method, url, headers_for(url))
            location = response.headers.get("Location")
            if not follow or response.status not in _REDIRECTS or not location:
                return response
            response.close(reusable=response.length == 0 or method == "HEAD")
            target = follow_location(url, location)
            if urlsplit(url).scheme == "https" and urlsplit(target).scheme != "https":
                raise TransportError(f"{without_secrets(url)} redirects from https to {without_secrets(target)}")
            url = target
        raise TransportError(f"{without_secrets(url)}: more than {_MOST_REDIRECTS} redirects")

    def _exchange(self, method: str, url: str, headers: Mapping[str, str]) -> Response:
        parts = as_transport_error(lambda: urlsplit(url))
        connection, fresh = self._connection(parts)
        try:
            return self._send(connection, method, url, headers)
        except TransportError:
            if fresh or self.stopped:
                raise
        # The server may have closed a kept connection, which is no failure: retry once on a new one.
        return self._send(self._connection(parts)[0], method, url, headers)

    def _send(self, connection: Connection, method: str, url: str, headers: Mapping[str, str]) -> Response:
        sent = {"Accept-Encoding": "identity", **headers}
        try:
            raw = as_transport_error(lambda: connection.exchange(method, url, sent, self.policy.read_timeout))
        except TransportError as error:
            self.drop(connection)
            if self.stopped:
                raise Interrupted from error
            raise
        if raw.status == 407:
            raise proxy_error("the proxy asks for a user name and a password, or refuses the ones that it got")
        return Response(self, connection, raw, url)

    def _connection(self, parts: SplitResult) -> tuple[Connection, bool]:
        """Return this thread's connection for a URL, and whether it is a new one."""
        if self.stopped:
            raise Interrupted
        key = (threading.get_ident(), parts.scheme, parts.netloc)
        if key in self._open:
            return self._open[key], False
        self._open[key] = as_transport_error(lambda: Connection(parts, self.policy.connect_timeout))
        return self._open[key], True

    def drop(self, connection: Connection) -> None:
        """Close a connection that cannot be used again."""
        connection.close()
        for key, kept in list(self._open.items()):
            if kept is connection:
                self._open.pop(key, None)

    def retrying(self, what: str, action: Callable[[], _T]) -> _T:
        """Call ``action`` until it does not raise :class:`TransportError`, as often as the policy allows.

        Raises:
            DownloadError: ``network``, naming ``what`` and the last reason.
        """
        for attempt in range(1, self.policy.attempts + 1):
            try:
                return action()
            except TransportError as error:
                if attempt == self.policy.attempts:
                    raise network_error(what, error, attempt) from error
                self.sleep(self.policy.pause(attempt))
        raise AssertionError("a policy allows at least one attempt")

    def wait_as_told(self, what: str, headers: Message | Mapping[str, str]) -> None:
        """Wait as long as Retry-After (seconds or a date) or RateLimit says; return at once if neither is sent.

        Raises:
            DownloadError: ``server_busy`` if that is longer than the policy allows.
        """
        seconds = requested_wait(headers)
        if seconds > self.policy.longest:
            raise DownloadError(
                f"{what}: the server asks to come back in {seconds:.0f} s, longer than the {self.policy.longest:.0f} s "
                "that are waited",
                code="server_busy",
                hint="run the same command again later; what was fetched is kept",
            )
        self.sleep(seconds)


def network_error(what: str, error: Exception, attempts: int) -> DownloadError:
    """The error for an exchange that failed for good."""
    return DownloadError(
        f"{what} failed {attempts} times in a row, last: {reason_of(error)}",
        code="network",
        hint="check the network, then run the same command again: what was fetched is kept",
    )
