"""References by URL: from allowed hosts only, within limits of bytes and time.

An allowed name must resolve to public addresses. An allowed address may be any, since it was listed on purpose.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from urllib.parse import urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import DefaultResolver

from port_kit.escape import shortened
from port_kit.serving.asgi import Refusal
from port_kit.serving.limits import Limits, option

MAX_REDIRECTS = 3
_CHUNK = 2**16
#: Public IPv6 addresses, and those of translators to IPv4.
_UNICAST, _NAT64 = ipaddress.IPv6Network("2000::/3"), ipaddress.IPv6Network("64:ff9b::/96")


class Fetcher:
    """Fetches the references of one request, within one deadline.

    Args:
        limits: of the server.
        bytes_left: sum of the sizes of all files.
    """

    def __init__(self, limits: Limits, bytes_left: int) -> None:
        self._limits = limits
        self._left = bytes_left
        self._deadline = asyncio.get_running_loop().time() + limits.fetch_seconds

    async def fetch(self, url: str) -> bytes:
        """Return the content of a URL.

        Raises:
            Refusal: the host is not allowed, or the content cannot be fetched. The message does not depend on what the
                server's network answers.
        """
        self.check(url)
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self._follow(url)
        except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
            host = shortened(urlsplit(url).hostname or "")
            raise Refusal(400, f"a reference could not be fetched from {host}") from error

    def check(self, url: str) -> None:
        """Refuse a URL whose host is not allowed, without a connection."""
        allowed = self._limits.reference_hosts
        if not allowed:
            raise Refusal(
                400,
                "references by URL are not allowed on this server; send the file itself, or a data URL "
                f"({option('reference_hosts')} of the server allows a host)",
            )
        if not _place(url) & {entry.lower() for entry in allowed}:
            raise Refusal(400, f"references may be fetched from {', '.join(allowed)} only, by http or https")

    async def _follow(self, url: str) -> bytes:
        connector = aiohttp.TCPConnector(resolver=PublicResolver(), use_dns_cache=False)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False, trust_env=False) as session:
            for _ in range(MAX_REDIRECTS + 1):
                self.check(url)
                headers = {"Accept-Encoding": "identity"}
                async with session.get(url, allow_redirects=False, headers=headers) as response:
                    if response.status in (301, 302, 303, 307, 308):
                        url = urljoin(url, response.headers.get("Location", ""))
                        continue
                    response.raise_for_status()
                    if response.headers.get("Content-Encoding", "identity") != "identity":
                        raise ValueError("compressed")
                    return await self._read(response)
        raise ValueError("too many redirects")

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        parts = []
        async for chunk in response.content.iter_chunked(_CHUNK):
            self._left -= len(chunk)
            if self._left < 0:
                raise ValueError("too large")
            parts.append(chunk)
        return b"".join(parts)


class PublicResolver(AbstractResolver):
    """Resolves names, and refuses those with an address that is not public.

    A connection is made to the addresses that were checked, so a name cannot resolve to another address later.
    """

    def __init__(self) -> None:
        self._names = DefaultResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Resolve a name; raise OSError if an address is not public."""
        found = await self._names.resolve(host, port, family)
        for entry in found:
            check_address(entry["host"])
        return found

    async def close(self) -> None:
        """Close the resolver."""
        await self._names.close()


def check_address(host: str) -> None:
    """Raise OSError if an address is not public, or is a notation for an IPv4 address that is not."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        address = _ipv4_in(address) or address
    is_unicast = isinstance(address, ipaddress.IPv4Address) or address in _UNICAST
    if not address.is_global or address.is_multicast or not is_unicast:
        raise OSError(f"{host} is not a public address")


def _ipv4_in(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address to which a translator or a tunnel would connect; None for other addresses."""
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped or address.sixtofour


def _place(url: str) -> set[str]:
    """Return the entries of ``reference_hosts`` that allow a URL, empty if none can: ``host`` or ``host:port``.

    An IPv6 address is in brackets.
    """
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError:
        return set()
    if parts.scheme not in ("http", "https") or not host or parts.username is not None:
        return set()
    host = f"[{host}]" if ":" in host else host
    return {host} if port in (None, 80, 443) else {f"{host}:{port}"}
