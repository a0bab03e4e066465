"""Bounded matching times of patterns: alternatives that exclude each other, and lookaheads."""

from __future__ import annotations

import itertools
import re

import pytest

from port_kit.remap import Rule
from port_kit.remap.matching_time import are_exclusive, parse_pattern
from tests.helpers import raises

EXCLUSIVE = [
    ("a", "b"),
    ("ab.*", "ac.*"),
    ("a+b", "b"),
    ("(a|b)c", "(a|b)a"),
    ("(ab|b)c", "c"),
    ("ab.*", "(?!ab).*"),
    ("(?!a)(?!b).", "b.*"),
    ("((?!ab).)b", "ab"),
    ("[ab]c", ".[ab]"),
]
NOT_PROVEN = [
    ("a*b", "b"),
    ("a.*", "ab"),
    (".*", "(?!ab).*"),
    ("a", "(?!ab).*"),
    ("(a|)b", "b"),
    ("ab|b", "b"),
    ("a", ".*(?!a)"),
    ("a", "(?<!a)a"),
    ("ab", "(?!a+b).*"),
]


@pytest.mark.parametrize(("one", "other"), EXCLUSIVE)
def test_a_proof_holds_for_every_short_text(one: str, other: str) -> None:
    assert are_exclusive(list(parse_pattern(f"(?:{one})")), list(parse_pattern(f"(?:{other})")))
    for text in map("".join, itertools.product("abc", repeat=4)):
        assert not (re.match(one, text) and re.match(other, text)), text


@pytest.mark.parametrize(("one", "other"), NOT_PROVEN)
def test_nothing_is_proven_of_alternatives_with_a_common_text(one: str, other: str) -> None:
    assert not are_exclusive(list(parse_pattern(f"(?:{one})")), list(parse_pattern(f"(?:{other})")))


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?:a_(\w+)|b_(\w+)|c_(\w+)|d_(\w+))\.weight",
        r"(?:a\.(.+)|b\.(.+)|c\.(.+)|d\.(.+))",
        r"(?:norm\.(.+)\.(.+)|(?!norm)(.+)\.(.+))",
        r"(?!.*norm)(.+)\.weight",
        r"(?!blocks\.\d+\.attn)(.+)\.weight",
        r"([^.]+)\.(?:(a.*)|(b.*)|(c.*)|(d.*))",
    ],
)
def test_exclusive_alternatives_and_lookaheads_are_accepted(pattern: str) -> None:
    assert Rule(pattern, "x").source == pattern


@pytest.mark.parametrize(
    "pattern",
    [
        r"(.+)\.(.+)\.(.+)\.(.+)",
        r"(?:(.+)x|(.+)y|(.+)z|(.+))\.weight",
        r"(?:a(.+)|b(.+))(.+)(.+)(.+)",
        r"(.+)(.+)(?!.*x.*y)z",
        r"(?!(.+)(.+)(.+)(.+)x).*",
        r"([^.]+)(\.)?([^.]+)(\.)?([^.]+)(\.)?([^.]+)",
        r"((?!a.*).){2}",
    ],
)
def test_everything_else_is_refused(pattern: str) -> None:
    with raises("remap_pattern"):
        Rule(pattern, "x")
