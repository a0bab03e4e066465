"""Escaping and shortening of untrusted text and values, for display."""

from __future__ import annotations

import re
import reprlib
from typing import Any

#: Longest text of a value in a message, and of the message of another library's exception, in characters.
MAX_QUOTED, MAX_REASON = 80, 400

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


def quoted(value: object, length: int = MAX_QUOTED) -> str:
    """Return a value as Python writes it, printable, in about ``length`` characters.

    What is cut has its size behind it. Only the part of a value that is shown is formatted. Arrays are shown by their
    shape, and long integers by their size, which Python refuses to write in decimals.

    >>> quoted([1, 10**5000])
    '[1, an integer of 16610 bits]'
    >>> quoted("a" * 90, 20)
    "'aaaaaaa...aaaaaaaa' (90 characters)"
    """
    text = escape_control_chars(_Quotes(length).repr(value))
    size = _size_of(value, length)
    return f"{shortened(text, length)} ({size})" if size else shortened(text, length)


def _size_of(value: object, length: int) -> str:
    """Return the size of a text or a collection of which a message of ``length`` characters has only a part."""
    if isinstance(value, str | bytes):
        is_whole = len(value) <= length and len(repr(value)) <= length
        return "" if is_whole else f"{len(value)} {'characters' if isinstance(value, str) else 'bytes'}"
    if isinstance(value, list | tuple | dict | set):
        most = 4 if isinstance(value, dict) else 6
        return "" if len(value) <= most else f"{len(value)} entries"
    return ""


def reason_of(error: BaseException, length: int = MAX_REASON) -> str:
    r"""Return the message of a library's exception for a message of the kit: one printable line of limited length.

    >>> reason_of(ValueError("no\n  such \x1b[2Jfile"))
    'no such \\x1b[2Jfile'
    >>> reason_of(EOFError())
    'EOFError'
    """
    return shortened(escape_control_chars(" ".join(str(error).split())), length) or type(error).__name__


def shortened(text: str, length: int = MAX_QUOTED) -> str:
    """Return the beginning and the end of a text, in at most ``length`` characters."""
    if len(text) <= length:
        return text
    end = length // 4
    return f"{text[: length - end - 3]}...{text[-end:]}"


class _Quotes(reprlib.Repr):
    """Formats values of any size in bounded time."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.maxstring = self.maxother = length

    def repr_int(self, value: int, level: int) -> str:
        return repr(value) if value.bit_length() <= 256 else f"an integer of {value.bit_length()} bits"

    def repr_bytes(self, value: bytes, level: int) -> str:
        return shortened(repr(value[: self.maxstring]), self.maxstring)

    def repr_instance(self, value: Any, level: int) -> str:
        shape = getattr(value, "shape", None)
        if isinstance(shape, tuple) and shape:
            return f"{type(value).__name__} {tuple(shape)}"
        return super().repr_instance(value, level)


def _escape(sign: str) -> str:
    return sign.encode("unicode_escape").decode("ascii")
