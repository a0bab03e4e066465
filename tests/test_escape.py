"""Untrusted text and values in messages."""

from __future__ import annotations

import time
import unicodedata
from typing import Any

import numpy as np
import pytest

from port_kit.escape import MAX_QUOTED, MAX_REASON, escape_control_chars, quoted, reason_of, shortened


class Strange:
    """An object whose text clears a terminal."""

    def __repr__(self) -> str:
        return "\x1b[2J" + "x" * 10**6


class Broken:
    """An object without a text."""

    def __repr__(self) -> str:
        raise RuntimeError


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        "".join(chr(number) for number in range(0x110000) if unicodedata.category(chr(number))[0] in "CZ"),
        "x" * 10**7,
        b"\x1b" * 10**7,
        10**100_000,
        [["x" * 10**6] * 10**4] * 10**4,
        {number: "\u202e" * 10**6 for number in range(1000)},
        deep(100_000),
        np.zeros(10**6),
        Strange(),
        Broken(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_quoted_value_is_short_and_printable(value: Any) -> None:
    started = time.process_time()
    text = quoted(value)
    assert text.isprintable() and len(text) <= MAX_QUOTED + 30
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("rain", "'rain'"),
        ("a\x1b[2J\u202e\u2028\ud800\n", r"'a\x1b[2J\u202e\u2028\ud800\n'"),
        ("x" * 10**6, f"'{'x' * 37}...{'x' * 38}' (1000000 characters)"),
        (b"\0" * 1000, "b'" + r"\x00" * 13 + r"\x0...x00\x00\x00\x00\x00' (1000 bytes)"),
        (list(range(9)), "[0, 1, 2, 3, 4, 5, ...] (9 entries)"),
        ({"a": 1.5, "b": None}, "{'a': 1.5, 'b': None}"),
        (10**100, "an integer of 333 bits"),
        (np.zeros((2, 3)), "ndarray (2, 3)"),
    ],
)
def test_what_is_left_out_is_told(value: Any, text: str) -> None:
    assert quoted(value) == text


def test_reasons_of_other_libraries_are_one_line() -> None:
    assert reason_of(ValueError("no\n  such\r\n\x1b[2Jfile \u202e")) == r"no such \x1b[2Jfile \u202e"
    assert reason_of(EOFError()) == "EOFError"
    long = reason_of(OSError("begin " + "x" * 10**7 + " end"))
    assert len(long) == MAX_REASON and long.startswith("begin ") and long.endswith(" end")


def test_a_text_is_cut_in_its_middle() -> None:
    assert shortened("a" * 50 + "b" * 50, 23) == "a" * 15 + "..." + "b" * 5
    assert escape_control_chars("a\tb\n", keep="\n") == "a\\tb\n"
