"""Escaping and shortening of untrusted text and values, for display."""

from __future__ import annotations

import re
import reprlib
from typing import Any

#: Longest text of a value in a message, in characters.
MAX_QUOTED = 80

_USER = re.compile(r"(?<=://)[^/?#\s@]*@(?=[^\s])")
_QUERY = re.compile(r"(?<=\w)\?[^\s'\"]*")


def escape_control_chars(text: str, keep: str = "") -> str:
    r"""Escape control characters, newlines, bidi overrides and lone surrogates, which terminals interpret or reject.

    Args:
        text: anything.
        keep: characters that stay, such as ``"\n"``.

    >>> escape_control_chars("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() or sign in keep else _escape(sign) for sign in text)


def redacted(url: str) -> str:
    """Return a URL, or a text with URLs, without the names, passwords and queries that may be secrets.

    >>> redacted("https://user:secret@host/path?token=secret")
    'https://host/path'
    """
    text = _USER.sub("", url)
    return _QUERY.sub("", text) if "://" in text else text


def quoted(value: object) -> str:
    """Return a value as Python writes it, in at most :data:`MAX_QUOTED` characters.

    Only the part of a value that is shown is formatted. Arrays are shown by their shape, and long integers by their
    size, which Python refuses to write in decimals.

    >>> quoted([1, 10**5000])
    '[1, an integer of 16610 bits]'
    """
    return shortened(_QUOTES.repr(value))


def shortened(text: str, length: int = MAX_QUOTED) -> str:
    """Return the beginning and the end of a text, in at most ``length`` characters."""
    if len(text) <= length:
        return text
    end = length // 4
    return f"{text[: length - end - 3]}...{text[-end:]}"


class _Quotes(reprlib.Repr):
    """Formats values of any size in bounded time."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = MAX_QUOTED

    def repr_int(self, value: int, level: int) -> str:
        return repr(value) if value.bit_length() <= 256 else f"an integer of {value.bit_length()} bits"

    def repr_bytes(self, value: bytes, level: int) -> str:
        return shortened(repr(value[:MAX_QUOTED]))

    def repr_instance(self, value: Any, level: int) -> str:
        shape = getattr(value, "shape", None)
        if isinstance(shape, tuple) and shape:
            return f"{type(value).__name__} {tuple(shape)}"
        return super().repr_instance(value, level)


_QUOTES = _Quotes()


def _escape(sign: str) -> str:
    return sign.encode("unicode_escape").decode("ascii")
