"""Bounded matching times of patterns: alternatives that exclude each other, and lookaheads."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from port_kit.errors import RemapError
from port_kit.remap import Rule, matching_time
from port_kit.remap.matching_time import MAX_OVERLAPPING, MAX_PATHS, REPEATS, are_exclusive, parse_pattern, sre
from port_kit.remap.patterns import compile_pattern
from tests.helpers import raises

#: Length of the texts whose matching is counted.
MAX_STEPPED = 16

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
    ("a?c", "a"),
    ("a?b?", "c"),
    ("a", ".*(?!a)"),
    ("a", "(?<!a)a"),
    ("ab", "(?!a+b).*"),
    ("é", "[^x]"),
    ("é", r"\w"),
    ("é", "[^é]"),
    ("é", "(?!ü)."),
]


PATTERNS = st.recursive(
    st.sampled_from(["a", "b", "[ab]", "a*", "[ab]+", "[^b]"]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=5).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["?", "??", "{2}", "{0,3}", "{1,2}"])).map(
            lambda parts: "(?:{}){}".format(*parts)
        ),
        inner.map("(?!{})".format),
    ),
    max_leaves=12,
)


def count_steps(tree: Any, text: str) -> int:
    """Return the number of single characters that are compared until a match of the complete text fails or is found."""
    steps = 0

    def ends(nodes: list[Any], at: int) -> Iterator[int]:
        """Yield where matches of a sequence end, in the order in which they are tried."""
        nonlocal steps
        if not nodes:
            yield at
            return
        (code, value), rest = nodes[0], nodes[1:]
        if code is sre.SUBPATTERN:
            yield from ends([*value[3], *rest], at)
        elif code is sre.BRANCH:
            for branch in value[1]:
                yield from ends([*branch, *rest], at)
        elif code in REPEATS:
            low, high, body = value
            if high > 0:
                fewer = (max(low - 1, 0), high if high is sre.MAXREPEAT else high - 1, body)
                yield from ends([*body, (code, fewer), *rest], at)
            if not low:
                yield from ends(rest, at)
        elif code is sre.ASSERT_NOT:
            if next(ends([*value[1]], at), None) is None:
                yield from ends(rest, at)
        else:
            steps += 1
            if at < len(text) and text[at] in matching_time.characters_of(code, value):
                yield from ends(rest, at + 1)

    any(end == len(text) for end in ends([*tree], 0))
    return steps


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
        r"(?:model\.)?(?:diffusion_model\.)?(?:transformer\.)?blocks\.(\d+)\.attn[12]?\.(?:to_)?(q|k|v|qkv)(?:_proj)?\.(.+)",
        r"(?:a\.)?(?:b\.)?(?:c\.)?(?:d\.)?(?:e\.)?(?:f\.)?(?:g\.)?(?:h\.)?(?:i\.)?x",
        r"x(?:\.\d){0,8}",
        r"(?:ab|a)c(?:de|d)?f" * 6,
    ],
)
def test_exclusive_alternatives_and_lookaheads_are_accepted(pattern: str) -> None:
    assert Rule(pattern, "x").source == pattern


@settings(max_examples=300, deadline=None)
@given(PATTERNS, st.text("aab", max_size=20))
def test_accepted_patterns_take_few_steps(pattern: str, text: str) -> None:
    """Count the steps of a matcher that backtracks as Python's does, on texts that nearly match."""
    try:
        tree = compile_pattern(pattern) and parse_pattern(pattern)
    except RemapError:
        reject()
    for name in (text, "a" * MAX_STEPPED, "ab" * (MAX_STEPPED // 2)):
        assert count_steps(tree, f"{name}!") <= MAX_PATHS * len(pattern) * (len(name) + 2) ** (MAX_OVERLAPPING + 1)


@pytest.mark.parametrize("size", [8, 12, 16])
def test_the_counter_sees_exponential_time(size: int) -> None:
    """Without a bound, one more optional part doubles the steps."""
    assert count_steps(parse_pattern("a?" * size + "b"), "a" * size + "!") > 2**size


def test_a_deep_pattern_is_judged_at_once() -> None:
    pattern = "a"
    while len(pattern) < 580:
        pattern = f"(?:{pattern}){{2}}"
    with patch.object(matching_time, "_paths", side_effect=matching_time._paths) as calls:
        matching_time.check_matching_time(parse_pattern(pattern))
    assert calls.call_count < 500


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
        r"a?" * 100 + "b",
        r"(a?)" * 30 + "a" * 30,
        r"(?:a?){8}b",
        r"(?:a|aa){8}c",
        r"(?:(?:a|ab)(?:c|bcd)?){3}e",
        r"(?:layers\.)?" * 6 + "x",
        r"(?!(?:a?){8}b)a.*",
        r"é*[^.]*é*[^.]*x",
    ],
)
def test_everything_else_is_refused(pattern: str) -> None:
    with raises("remap_pattern"):
        Rule(pattern, "x")
