"""Text of strangers, made fit to be shown: names of files and tensors may hold anything."""

from __future__ import annotations


def plain(text: str, keep: str = "") -> str:
    r"""Write as escapes what has no shape of its own: control sequences, line ends, signs that turn the direction of
    writing, halves of pairs. A terminal obeys the first three, and none takes the last.

    Args:
        text: anything.
        keep: characters that stay, such as ``"\n"``.

    >>> plain("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() or sign in keep else _escape(sign) for sign in text)


def _escape(sign: str) -> str:
    return sign.encode("unicode_escape").decode("ascii")
