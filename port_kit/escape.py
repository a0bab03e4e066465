"""Escaping of untrusted text from servers, repositories and files, for display."""

from __future__ import annotations

import re

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


def _escape(sign: str) -> str:
    return sign.encode("unicode_escape").decode("ascii")
