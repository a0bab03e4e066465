"""References of requests as bytes, however they arrived."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re

from port_kit.serving.asgi import Refusal
from port_kit.serving.fetch import Fetcher

#: Start of a data URL, up to its comma, and its largest length.
_HEAD, _MAX_HEAD = re.compile(r"data:[\w.+/-]*(;[\w.+=-]+)*;base64", re.ASCII), 256

_NO_DATA_URL = "[input_unreadable] a data URL is not 'data:TYPE;base64,...'"


async def content_of(url: str, fetcher: Fetcher) -> bytes:
    """Return the content of a data URL, or of a URL of an allowed host.

    Raises:
        Refusal: it is no such URL, or the content cannot be fetched.
    """
    if url[:5].lower() != "data:":
        return await fetcher.fetch(url)
    end = url.find(",", 0, _MAX_HEAD)
    if end < 0 or not _HEAD.fullmatch(url, 0, end):
        raise Refusal(400, _NO_DATA_URL)
    try:
        return await asyncio.to_thread(base64.b64decode, url[end + 1 :], validate=True)
    except (ValueError, binascii.Error) as error:
        raise Refusal(400, _NO_DATA_URL) from error
