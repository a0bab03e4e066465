"""Addresses from which references are never fetched, in any notation."""

from __future__ import annotations

import asyncio

import pytest

from port_kit.serving.asgi import Refusal
from port_kit.serving.fetch import Fetcher, check_address
from port_kit.serving.limits import Limits

PRIVATE = "0.0.0.0 10.1.2.3 100.64.0.1 127.0.0.1 169.254.169.254 172.16.0.1 192.168.0.1 224.0.0.1 240.0.0.1".split()


@pytest.mark.parametrize("address", PRIVATE)
def test_a_private_address_is_refused_in_any_notation(address: str) -> None:
    number = int.from_bytes(map(int, address.split(".")))
    sixtofour = f"2002:{number >> 16:x}:{number & 0xFFFF:x}::1"
    for text in (address, f"::ffff:{address}", f"::{address}", f"64:ff9b::{address}", sixtofour):
        with pytest.raises(OSError, match="is not a public address"):
            check_address(text)


@pytest.mark.parametrize(
    "address", ["::", "::1", "fc00::1", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "64:ff9b:1::a", "2001::1"]
)
def test_a_private_ipv6_address_is_refused(address: str) -> None:
    with pytest.raises(OSError, match="is not a public address"):
        check_address(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::1", "2606:4700::1"]
)
def test_a_public_address_is_allowed(address: str) -> None:
    check_address(address)


@pytest.mark.parametrize(
    ("url", "is_allowed"),
    [
        ("http://[::1]/a.png", True),
        ("https://[::1]:443/a.png", True),
        ("http://[::1]:8080/", False),
        ("http://[2001:db8::2]:8080/", True),
        ("http://[2001:db8::2]/", False),
        ("http://EXAMPLE.com/", True),
        ("http://example.com:8080/", False),
        ("http://example.com.evil.org/", False),
        ("http://example.com@evil.org/", False),
        ("http://evil.org#@example.com/", False),
        ("http://evil.org\\@example.com/", False),
        ("//example.com/", False),
        ("ftp://example.com/", False),
        ("http://example.com:99999/", False),
        ("http://[::1", False),
    ],
)
def test_a_host_is_allowed_as_it_is_listed(url: str, is_allowed: bool) -> None:
    limits = Limits(reference_hosts=("[::1]", "[2001:db8::2]:8080", "Example.com"))

    async def check() -> None:
        Fetcher(limits, 1).check(url)

    if is_allowed:
        asyncio.run(check())
    else:
        with pytest.raises(Refusal, match="may be fetched from"):
            asyncio.run(check())
