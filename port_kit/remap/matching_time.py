"""Bounds of the time that a source pattern takes to match a name.

Each path through a parsed pattern, one alternative of each branch, has a chain: the unbounded repeats in a row that can
exchange characters. Matching takes (length of the name) ** (length of the longest chain), so longer chains are
refused. Alternatives of a branch are paths of their own if they exclude each other; a proof needs two different
characters at one place, or a negative lookahead of the other alternative's beginning. Others also count as a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations
from re import _constants as sre  # type: ignore[attr-defined]  # the parsed form has no public module
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

#: Unbounded repeats in a row that can match the same characters.
MAX_OVERLAPPING = 3
#: Largest counted repeat, ``{m,n}``.
MAX_COUNTED = 8
REPEATS = (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT)
_ALPHABET = frozenset(map(chr, range(32, 127)))
_SINGLE = (sre.LITERAL, sre.IN, sre.ANY, sre.NOT_LITERAL)

Characters = frozenset[str]
#: Characters of unbounded repeats that can still exchange some with the next one.
Chain = tuple[Characters, ...]


class UnboundedError(ValueError):
    """A pattern's matching time is not bounded; the message continues the sentence "the pattern ..."."""


def parse_pattern(pattern: str) -> Any:
    """Return the syntax tree of a regular expression."""
    return parser.parse(pattern)


def check_matching_time(tree: Any) -> None:
    """Require a bounded matching time of a parsed pattern.

    Raises:
        UnboundedError: the reason.
    """
    _walk(tree, {()}, repeated=False)


def _walk(tree: Any, chains: set[Chain], *, repeated: bool) -> set[Chain]:
    """Return the chains of all paths behind a sequence, from those before it."""
    for code, value in tree:
        if code in _SINGLE:
            chains = {_after_one(chain, characters_of(code, value)) for chain in chains}
        elif code in REPEATS:
            chains = _walk_repeat(value, chains, repeated=repeated)
        elif code is sre.SUBPATTERN:
            chains = _walk(value[3], chains, repeated=repeated)
        elif code is sre.BRANCH:
            chains = _walk_branch(value[1], chains, repeated=repeated)
        elif code in (sre.ASSERT, sre.ASSERT_NOT):
            # tried once per arrival, and never entered again: the chain behind it is the one before it
            _walk(value[1], chains, repeated=repeated)
        elif code is not sre.AT:
            raise UnboundedError(f"uses {str(code).lower()}, which has no bounded matching time")
    return chains


def _after_one(chain: Chain, characters: Characters) -> Chain:
    return chain if all(characters <= link for link in chain) else ()


def _walk_repeat(value: Any, chains: set[Chain], *, repeated: bool) -> set[Chain]:
    low, high, body = value
    if high is not sre.MAXREPEAT:
        if high > MAX_COUNTED:
            raise UnboundedError(f"repeats something up to {high} times")
        behind = _walk(body, chains, repeated=repeated or high > 1)
        return behind if low else chains | behind
    if repeated:
        raise UnboundedError("has a repeat inside a repeat")
    if len(body) != 1 or body[0][0] not in _SINGLE:
        raise UnboundedError("repeats more than one character without bound")
    characters = characters_of(*body[0])
    if low > 1:
        chains = {_after_one(chain, characters) for chain in chains}
    longer = {(*(link for link in chain if link & characters), characters) for chain in chains}
    if any(len(chain) > MAX_OVERLAPPING for chain in longer):
        raise UnboundedError(f"has more than {MAX_OVERLAPPING} repeats that can match the same characters")
    return longer


def _walk_branch(branches: list[Any], chains: set[Chain], *, repeated: bool) -> set[Chain]:
    behind = {chain for branch in branches for chain in _walk(branch, chains, repeated=repeated)}
    if not all(are_exclusive(one, other) for one, other in combinations(branches, 2)):
        for branch in branches:
            chains = _walk(branch, chains, repeated=repeated)
        behind |= chains
    return behind


def are_exclusive(one: Any, other: Any) -> bool:
    """Return True if it is proven that no text begins with a match of both of two parsed alternatives."""
    first, second = _beginning(one), _beginning(other)
    if any(mine and theirs and not mine & theirs for mine, theirs in zip(first, second, strict=False)):
        return True
    return _is_excluded(first, other) or _is_excluded(second, one)


def _is_excluded(beginning: list[Characters], other: Any) -> bool:
    """Return True if a negative lookahead at the start of the other alternative matches each such beginning."""
    for text in _leading_lookaheads(other):
        if text and len(text) <= len(beginning) and all(a <= b for a, b in zip(beginning, text, strict=False)):
            return True
    return False


def _leading_lookaheads(tree: Any) -> Iterator[list[Characters]]:
    """Yield the texts of negative lookaheads at the start of an alternative, of those that are plain texts."""
    for code, value in tree:
        if code is sre.SUBPATTERN:
            yield from _leading_lookaheads(value[3])
        if code is not sre.ASSERT_NOT:
            return
        direction, body = value
        if direction > 0 and all(kind in _SINGLE for kind, _ in body):
            yield [characters_of(*step) for step in body]


def _beginning(tree: Any) -> list[Characters]:
    """Return the characters of the first places of every match, as far as each has its place."""
    return list(_places(tree))


def _places(tree: Any) -> Iterator[Characters | Any]:
    for code, value in tree:
        if code in _SINGLE:
            yield characters_of(code, value)
        elif code is sre.SUBPATTERN and _is_fixed(value[3]):
            yield from _places(value[3])
        elif code is sre.SUBPATTERN:
            yield from _places(value[3])
            return
        elif code in (sre.ASSERT, sre.ASSERT_NOT):
            continue
        else:
            yield from _first_places(code, value)
            return


def _first_places(code: Any, value: Any) -> Iterator[Characters]:
    """Yield the places of a repeat or a branch that every match of it has."""
    if code in REPEATS and value[0] >= 1:
        yield from _places(value[2])
    elif code is sre.BRANCH:
        for places in zip(*map(_beginning, value[1]), strict=False):
            yield frozenset().union(*places)


def _is_fixed(tree: Iterable[Any]) -> bool:
    """Return True if all matches have the same length, one place for each step."""
    return all(code in _SINGLE or (code is sre.SUBPATTERN and _is_fixed(value[3])) for code, value in tree)


def characters_of(code: Any, value: Any) -> Characters:
    """Return the printable characters that a single step can match."""
    if code is sre.ANY:
        return _ALPHABET
    if code is not sre.IN:
        value = [(sre.NEGATE, None)] * (code is sre.NOT_LITERAL) + [(sre.LITERAL, value)]
    matched: set[str] = set()
    for kind, item in value:
        if kind is sre.LITERAL:
            matched.add(chr(item))
        elif kind is sre.RANGE:
            matched.update(map(chr, range(item[0], min(item[1], 0xFFFF) + 1)))
        elif kind is sre.CATEGORY:
            matched |= _CATEGORIES.get(item, _ALPHABET)
    return frozenset(_ALPHABET - matched if value[0][0] is sre.NEGATE else matched)


_WORD = frozenset(character for character in _ALPHABET if character.isalnum() or character == "_")
_CATEGORIES = {
    sre.CATEGORY_DIGIT: frozenset("0123456789"),
    sre.CATEGORY_NOT_DIGIT: _ALPHABET - frozenset("0123456789"),
    sre.CATEGORY_WORD: _WORD,
    sre.CATEGORY_NOT_WORD: _ALPHABET - _WORD,
    sre.CATEGORY_SPACE: frozenset(" "),
    sre.CATEGORY_NOT_SPACE: _ALPHABET - {" "},
}
