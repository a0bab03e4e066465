"""URLs, connections, proxies and waiting times: the parts of HTTP that precede a request."""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from email.message import Message
from email.utils import parsedate_to_datetime
from functools import cache
from typing import TypeVar
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from port_kit.errors import DownloadError
from port_kit.escape import reason_of, redacted

_ASCII = "".join(map(chr, range(128)))
_T = TypeVar("_T")


class TransportError(Exception):
    """An exchange that broke: worth another attempt. Never leaves this package."""


def follow_location(url: str, location: str) -> str:
    """Return the absolute URL that a redirect names.

    Raises:
        TransportError: it is none that can be asked.
    """

    def join() -> str:
        # Headers are read as Latin-1; servers send the bytes of UTF-8 as they are.
        target = urljoin(url, quote(location.encode("latin-1", "replace"), safe=_ASCII))
        _ = urlsplit(target).port  # raises if it is not a number
        return target

    return as_transport_error(join)


def origin_of(url: str) -> tuple[str, str, int | None]:
    """Return scheme, host and port of a URL; a default port counts as stated.

    Raises:
        ValueError: the URL has no valid host or port.
    """
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def without_secrets(url: str) -> str:
    """Return a URL without parts that may be secret."""
    return redacted(urlsplit(url)._replace(query="", fragment="").geturl())


def is_number(text: str) -> bool:
    return text.strip().isdecimal() and text.isascii()


def as_transport_error(action: Callable[[], _T]) -> _T:
    """Call ``action``; errors of a connection, an answer or a server's URL are worth another attempt."""
    try:
        return action()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise TransportError(f"{type(error).__name__}: {reason_of(error)}") from error


def requested_wait(headers: Message | Mapping[str, str]) -> float:
    """Seconds that an answer asks to wait: ``Retry-After`` in both forms, or ``RateLimit: ...;r=0;t=N``."""
    value = headers.get("Retry-After")
    if value is not None:
        if is_number(value):
            return float(value)
        dates = headers.get_all("Date", []) if isinstance(headers, Message) else []
        now = max(map(_timestamp, dates), default=0.0) or time.time()  # the server's own clock, if it shows it
        return max(0.0, _timestamp(value) - now)
    fields = dict(part.strip().partition("=")[::2] for part in (headers.get("RateLimit") or "").split(";"))
    if fields.get("r") == "0" and is_number(fields.get("t", "")):
        return float(fields["t"])
    return 0.0


def _timestamp(date: str) -> float:
    """Seconds since 1970 of a date in a header; 0 if it is none."""
    try:
        return parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError, TypeError):
        return 0.0


class Connection:
    """A kept connection to a server, or to the proxy on the way there; for one request at a time.

    Raises:
        TransportError: the URL is not one of HTTP.
        DownloadError: ``proxy`` if the proxy cannot be used.
    """

    def __init__(self, parts: SplitResult, timeout: float) -> None:
        host, port = parts.hostname or "", parts.port
        if parts.scheme not in ("http", "https") or not host:
            raise TransportError(f"{without_secrets(parts.geturl())} is not an http(s) URL")
        via = _proxy(parts)
        peer, peer_port = (via.hostname or "", via.port or 80) if via else (host, port)
        headers = _proxy_headers(via) if via else {}
        self._socket: socket.socket | None = None
        self._names_whole_urls = via is not None and parts.scheme == "http"
        self._headers = headers if self._names_whole_urls else {}
        if parts.scheme == "http":
            self._http = http.client.HTTPConnection(peer, peer_port, timeout=timeout)
            return
        self._http = http.client.HTTPSConnection(peer, peer_port, timeout=timeout, context=_tls())
        if via:
            self._http.set_tunnel(host, port, headers=headers)

    def exchange(self, method: str, url: str, headers: Mapping[str, str], timeout: float) -> http.client.HTTPResponse:
        """Send a request and return the head of the answer, which may be silent for ``timeout`` seconds."""
        parts = urlsplit(url)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._http.request(method, url if self._names_whole_urls else path, headers={**headers, **self._headers})
        self._socket = self._http.sock  # an answer that ends the connection takes it from there
        if self._socket is not None:
            self._socket.settimeout(timeout)
        return self._http.getresponse()

    def abort(self) -> None:
        """Break the exchange off, from any thread."""
        for opened in (self._http.sock, self._socket):
            with contextlib.suppress(OSError):  # it was closed in the meantime, which is all that is wanted
                if opened is not None:
                    opened.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; no thread may use it any more."""
        self._http.close()


def _proxy(parts: SplitResult) -> SplitResult | None:
    """Return the proxy for a URL; one that is not reached by plain HTTP would get its password in clear text."""
    known = getproxies()
    found = known.get(parts.scheme) or known.get("all")
    if not found or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    via = urlsplit(found if "://" in found else f"http://{found}")
    if via.scheme != "http" or not via.hostname:
        raise proxy_error(
            f"the proxy {redacted(via.geturl())} is not http://HOST:PORT; TLS and SOCKS are not supported"
        )
    return via


def _proxy_headers(via: SplitResult) -> dict[str, str]:
    if via.username is None:
        return {}
    pair = f"{unquote(via.username)}:{unquote(via.password or '')}".encode()
    return {"Proxy-Authorization": f"Basic {base64.b64encode(pair).decode()}"}


def proxy_error(message: str) -> DownloadError:
    return DownloadError(message, code="proxy", hint="correct HTTPS_PROXY, HTTP_PROXY or ALL_PROXY, or set NO_PROXY")


@cache
def _tls() -> ssl.SSLContext:
    bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    return ssl.create_default_context(cafile=bundle or None)
