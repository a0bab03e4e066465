"""Tests of docs/architecture.md: the calls that it names exist, and each walk stays short."""

from __future__ import annotations

import importlib
import re
from functools import reduce
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"
WALKS = ("A weight, from its URL to a parameter", "A request, from its prompt to an MP4 file")
LONGEST = 25


def steps(title: str) -> list[tuple[int, str]]:
    """Return the numbers and calls of a walk."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    return [(int(number), call) for number, call in re.findall(r"^\| (\d+) \| `([\w.]+:[\w.]+)` \|", section, re.M)]


@pytest.mark.parametrize("title", WALKS)
def test_a_walk_is_numbered_and_short(title: str) -> None:
    numbers = [number for number, _ in steps(title)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert 10 < len(numbers) <= LONGEST


@pytest.mark.parametrize("call", [call for title in WALKS for _, call in steps(title)])
def test_a_call_of_a_walk_exists(call: str) -> None:
    module, _, names = call.partition(":")
    assert callable(reduce(getattr, names.split("."), importlib.import_module(module)))
