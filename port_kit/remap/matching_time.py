"""Bounds of the time that a source pattern takes to match a name.

Each path through a parsed pattern, one alternative of each branch and one number of each counted repeat, has a chain:
the unbounded repeats in a row that can exchange characters. Matching takes at most (number of paths that one name can
follow) * (length of the name) ** (length of the longest chain), so more paths and longer chains are refused.

Alternatives that exclude each other count as one path; a proof needs two different characters at one place, or a
negative lookahead of the other alternative's beginning. An optional part and what follows it are alternatives, too.
In chains, other alternatives also count as a row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import combinations
from re import _constants as sre  # type: ignore[attr-defined]  # the parsed form has no public module
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

#: Unbounded repeats in a row that can match the same characters.
MAX_OVERLAPPING = 3
#: Paths that one name can follow.
MAX_PATHS = 16
#: Largest counted repeat, ``{m,n}``.
MAX_COUNTED = 8
REPEATS = (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT)
#: All characters but printable ASCII, and the end of the name.
_OTHER, _END = "other", "end"
_PRINTABLE = frozenset(map(chr, range(32, 127)))
_ALPHABET = _PRINTABLE | {_OTHER}
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
    if _paths(tree, [(sre.AT, sre.AT_END_STRING)]) > MAX_PATHS:
        raise UnboundedError(f"has more than {MAX_PATHS} paths that one name can follow")


def _paths(tree: Any, rest: list[Any]) -> int:
    """Return an upper bound of the paths through a sequence that one text can follow; ``rest`` comes behind it."""
    paths = 1
    for at, (code, value) in enumerate(tree):
        behind = [*tree[at + 1 :], *rest]
        if code is sre.SUBPATTERN:
            paths *= _paths(value[3], behind)
        elif code is sre.BRANCH:
            paths *= _paths_of_branch([[*branch] for branch in value[1]], behind)
        elif code in REPEATS and value[1] is not sre.MAXREPEAT:
            paths *= _paths_of_repeat(value, behind)
        elif code in (sre.ASSERT, sre.ASSERT_NOT):
            paths *= _paths(value[1], [])
        if paths > MAX_PATHS:
            break
    return paths


def _paths_of_branch(branches: list[list[Any]], rest: list[Any]) -> int:
    counts = [_paths(branch, rest) for branch in branches]
    exclusive = all(are_exclusive([*one, *rest], [*other, *rest]) for one, other in combinations(branches, 2))
    return max(counts) if exclusive else sum(counts)


def _paths_of_repeat(value: Any, rest: list[Any]) -> int:
    low, high, body = value
    once = _paths(body, rest if high == 1 else [])  # behind a repeated body comes the body or the rest: prove nothing
    if low == high or are_exclusive([*body, *rest], rest):
        return once**high
    return sum(once**count for count in range(low, high + 1))


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
        exact = not any(_OTHER in place for place in text)
        if text and exact and len(text) <= len(beginning) and all(map(frozenset.issubset, beginning, text)):
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


def _beginning(tree: Iterable[Any]) -> list[Characters]:
    """Return the characters of the first places of every match, as far as each has its place."""
    return list(_places(tree))


def _places(tree: Iterable[Any]) -> Iterator[Characters]:
    steps, optional = deque(tree), frozenset[str]()  # first characters of parts that a match may leave out
    while steps:
        code, value = steps.popleft()
        if code is sre.SUBPATTERN:
            steps.extendleft(reversed(value[3]))
            continue
        if code in (sre.ASSERT, sre.ASSERT_NOT):
            continue
        places = _places_of_step(code, value)
        if not places:
            return
        if _is_optional(code, value):
            optional |= places[0]
        elif optional:
            yield optional | places[0]
            return
        else:
            yield from places
            if code not in _SINGLE:
                return


def _places_of_step(code: Any, value: Any) -> list[Characters]:
    """Return the places that every match of one step has, if it is not left out."""
    if code in _SINGLE:
        return [characters_of(code, value)]
    if code in REPEATS:
        return _beginning(value[2])
    if code is sre.BRANCH:
        beginnings = [_beginning(branch) for branch in value[1] if len(branch)]
        return [frozenset().union(*places) for places in zip(*beginnings, strict=False)]
    return [frozenset({_END})] if value is sre.AT_END_STRING else []


def _is_optional(code: Any, value: Any) -> bool:
    return code in REPEATS and not value[0] or code is sre.BRANCH and not all(map(len, value[1]))


def characters_of(code: Any, value: Any) -> Characters:
    """Return the characters that a single step can match."""
    if code is sre.ANY:
        return _ALPHABET
    if code is not sre.IN:
        value = [(sre.NEGATE, None)] * (code is sre.NOT_LITERAL) + [(sre.LITERAL, value)]
    matched: set[str] = set()
    for kind, item in value:
        if kind is sre.LITERAL:
            matched |= _characters(item, item)
        elif kind is sre.RANGE:
            matched |= _characters(*item)
        elif kind is sre.CATEGORY:
            matched |= _CATEGORIES.get(item, _ALPHABET)
    # a set that has some of the other characters and its complement both have OTHER
    return frozenset((_ALPHABET - matched) | {_OTHER} if value[0][0] is sre.NEGATE else matched)


def _characters(first: int, last: int) -> set[str]:
    found = {character for character in _PRINTABLE if first <= ord(character) <= last}
    return found if len(found) == last - first + 1 else found | {_OTHER}


_DIGITS = frozenset("0123456789")
_WORD = frozenset(character for character in _PRINTABLE if character.isalnum() or character == "_")
_CATEGORIES = {
    sre.CATEGORY_DIGIT: _DIGITS | {_OTHER},
    sre.CATEGORY_NOT_DIGIT: _ALPHABET - _DIGITS,
    sre.CATEGORY_WORD: _WORD | {_OTHER},
    sre.CATEGORY_NOT_WORD: _ALPHABET - _WORD,
    sre.CATEGORY_SPACE: frozenset({" ", _OTHER}),
    sre.CATEGORY_NOT_SPACE: _ALPHABET - {" "},
}
