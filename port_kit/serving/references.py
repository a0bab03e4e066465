"""References of requests as bytes, however they arrived."""

from __future__ import annotations

import base64
import binascii
import re

from port_kit.serving.asgi import Refusal
from port_kit.serving.fetch import Fetcher

_DATA_URL = re.compile(r"data:[\w.+/-]*(;[\w.+=-]+)*;base64,", re.ASCII)


async def content_of(url: str, fetcher: Fetcher) -> bytes:
    """Return the content of a data URL, or of a URL of an allowed host.

    Raises:
        Refusal: it is no such URL, or the content cannot be fetched.
    """
    if url[:5].lower() != "data:":
        return await fetcher.fetch(url)
    match = _DATA_URL.match(url)
    try:
        if match is None:
            raise ValueError("no base64")
        return base64.b64decode(url[match.end() :], validate=True)
    except (ValueError, binascii.Error) as error:
        raise Refusal(400, "[input_unreadable] a data URL is not 'data:TYPE;base64,...'") from error
