"""Source patterns and target templates: which regular expressions are taken, and what depends on a layer number.

A pattern matches a whole name. Patterns whose matching time could explode are refused when a rule is made, so no name
can hang a load. The same walk over the parsed pattern finds out which numbers it tells apart: a name such as
``blocks.17.attn.q.weight`` needs matching once for all of ``blocks.*``, unless some pattern says ``blocks\\.17``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from re import _constants as sre  # type: ignore[attr-defined]  # the parsed form has no public module
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from port_kit.errors import RemapError

MAX_PATTERN_LENGTH = 600
#: Longest tensor name that is matched: together with MAX_OVERLAPPING it bounds the matching time.
MAX_NAME_LENGTH = 256
#: Unbounded repeats that may follow each other without a character between them that ends the first.
MAX_OVERLAPPING = 3
#: Largest counted repeat, ``{m,n}``.
MAX_COUNTED = 8
#: Ways through a pattern, and numbers it spells out, up to which it is looked at number by number.
MAX_WAYS = 256
MAX_NUMBERS = 200
_DIGITS = frozenset("0123456789")
_ALPHABET = frozenset(chr(code) for code in range(32, 127))
_REPEATS = (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT)


@dataclass(frozen=True)
class Atom:
    """One step of a pattern in reading order: the characters it can take, and whether it repeats without end."""

    characters: frozenset[str]
    unbounded: bool = False


@lru_cache(maxsize=8192)
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile a source pattern.

    Raises:
        RemapError: ``remap_pattern`` where it is not a regular expression or its matching time is not bounded.
    """
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise _bad(pattern, f"is longer than {MAX_PATTERN_LENGTH} characters")
    try:
        compiled = re.compile(pattern)
        tree = parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise _bad(pattern, f"is not a regular expression: {error}") from error
    if compiled.flags != re.compile("").flags:
        raise _bad(pattern, "sets flags")
    _check(list(_atoms(tree, pattern)), pattern)
    return compiled


@lru_cache(maxsize=8192)
def literal_numbers(pattern: str) -> frozenset[str] | None:
    """Return the numbers that a pattern tells from others, or None where that cannot be listed.

    Every number outside the set takes the same way through the pattern, so it may stand for all of them.
    """
    numbers: set[str] = set()
    ways = _ways(parser.parse(pattern), pattern)
    for way in ways or ():
        found = _numbers_of(way)
        if found is None:
            return None
        numbers |= found
    return frozenset(numbers) if ways is not None else None


def _numbers_of(way: list[Atom]) -> set[str] | None:
    """The numbers that one way through a pattern spells out; None where digits meet a part that takes digits too."""
    numbers: set[str] = set()
    runs: list[str] = []
    previous = Atom(frozenset())
    for atom in [*way, Atom(frozenset())]:
        if atom.characters <= _DIGITS and atom.characters and not atom.unbounded:
            if not runs and previous.characters & _DIGITS:
                return None
            runs = [run + digit for run in runs or [""] for digit in sorted(atom.characters)]
        else:
            if runs and atom.characters & _DIGITS or len(runs) > MAX_NUMBERS:
                return None
            if atom.characters & _DIGITS and not (atom.unbounded and atom.characters >= _DIGITS):
                return None
            numbers.update(runs)
            runs = []
        previous = atom
    return numbers


def _ways(tree: Any, pattern: str) -> list[list[Atom]] | None:
    """All ways through a parsed pattern, branches that hold no digit taken as one; None where there are too many."""
    ways: list[list[Atom]] = [[]]
    for code, value in tree:
        choices: list[list[Atom]] | None
        if code is sre.SUBPATTERN:
            choices = _ways(value[3], pattern)
        elif code is sre.BRANCH:
            choices = _branches(value[1], pattern)
        elif code in _REPEATS and value[1] is not sre.MAXREPEAT:
            body = _ways(value[2], pattern) if value[1] <= MAX_COUNTED else None
            choices = body and _counted(body, value[0], value[1])
        else:
            choices = [list(_atoms([(code, value)], pattern))]
        if choices is None or len(ways) * len(choices) > MAX_WAYS:
            return None
        ways = [way + choice for way in ways for choice in choices]
    return ways


def _branches(branches: list[Any], pattern: str) -> list[list[Atom]] | None:
    kept: list[list[Atom]] = []
    without_digits: list[Atom] | None = None
    for branch in branches:
        ways = _ways(branch, pattern)
        if ways is None:
            return None
        for way in ways:
            if way and not any(atom.characters & _DIGITS for atom in way):
                without_digits = way
            else:
                kept.append(way)
    return kept + ([without_digits] if without_digits is not None else [])


def _counted(body: list[list[Atom]], low: int, high: int) -> list[list[Atom]]:
    ways: list[list[Atom]] = []
    for count in range(low, high + 1):
        ways += [[atom for part in parts for atom in part] for parts in itertools.product(body, repeat=count)]
    return ways


def _atoms(tree: Any, pattern: str, repeated: bool = False) -> Iterator[Atom]:
    """Yield the steps of a parsed pattern; branches come one after the other with a step that takes nothing between."""
    for code, value in tree:
        if code is sre.LITERAL:
            yield Atom(frozenset(chr(value)))
        elif code in (sre.IN, sre.ANY, sre.NOT_LITERAL):
            yield Atom(_characters(code, value))
        elif code in _REPEATS:
            yield from _repeat(value, pattern, repeated)
        elif code is sre.SUBPATTERN:
            yield from _atoms(value[3], pattern, repeated)
        elif code is sre.BRANCH:
            for branch in value[1]:
                yield from _atoms(branch, pattern, repeated)
        elif code in (sre.ASSERT, sre.ASSERT_NOT):
            yield from _atoms(value[1], pattern, True)
        elif code is not sre.AT:
            raise _bad(pattern, f"uses {str(code).lower()}, which has no bounded matching time")


def _repeat(value: tuple[int, int, Any], pattern: str, repeated: bool) -> Iterator[Atom]:
    low, high, body = value
    if high is not sre.MAXREPEAT:
        if high > MAX_COUNTED:
            raise _bad(pattern, f"repeats something up to {high} times")
        yield from _atoms(body, pattern, repeated or high > 1)
        return
    if repeated:
        raise _bad(pattern, "has a repeat inside a repeat or an assertion")
    if len(body) != 1 or body[0][0] not in (sre.LITERAL, sre.IN, sre.ANY, sre.NOT_LITERAL):
        raise _bad(pattern, "repeats more than one character without end")
    if low > 1:
        yield Atom(_characters(*body[0]))
    yield Atom(_characters(*body[0]), unbounded=True)


def _characters(code: Any, value: Any) -> frozenset[str]:
    """The printable characters that a single step takes."""
    if code is sre.LITERAL:
        return frozenset(chr(value))
    if code is sre.ANY:
        return _ALPHABET
    if code is sre.NOT_LITERAL:
        return _ALPHABET - {chr(value)}
    taken: set[str] = set()
    for kind, what in value:
        if kind is sre.LITERAL:
            taken.add(chr(what))
        elif kind is sre.RANGE:
            taken.update(chr(at) for at in range(what[0], min(what[1], 0xFFFF) + 1))
        elif kind is sre.CATEGORY:
            taken |= _CATEGORIES.get(what, _ALPHABET)
    return frozenset(_ALPHABET - taken if value[0][0] is sre.NEGATE else taken)


_WORD = frozenset(character for character in _ALPHABET if character.isalnum() or character == "_")
_CATEGORIES = {
    sre.CATEGORY_DIGIT: _DIGITS,
    sre.CATEGORY_NOT_DIGIT: _ALPHABET - _DIGITS,
    sre.CATEGORY_WORD: _WORD,
    sre.CATEGORY_NOT_WORD: _ALPHABET - _WORD,
    sre.CATEGORY_SPACE: frozenset(" "),
    sre.CATEGORY_NOT_SPACE: _ALPHABET - {" "},
}


def _check(atoms: list[Atom], pattern: str) -> None:
    """Refuse chains of repeats that can trade characters with each other: they cost (length of name)^(repeats)."""
    chain: list[Atom] = []
    for atom in atoms:
        if chain and not atom.unbounded and not all(atom.characters <= link.characters for link in chain):
            chain = []
        if atom.unbounded:
            chain = [link for link in chain if link.characters & atom.characters] + [atom]
        if len(chain) > MAX_OVERLAPPING:
            raise _bad(pattern, f"has more than {MAX_OVERLAPPING} repeats that can match the same characters")


def _bad(pattern: str, why: str) -> RemapError:
    shown = pattern if len(pattern) <= 80 else f"{pattern[:77]}..."
    return RemapError(
        f"pattern {shown!r} {why}",
        code="remap_pattern",
        hint=r"write names out and use (\d+), ([^.]+) and (a|b) for what varies",
        pattern=shown,
    )


_TEMPLATE_PART = re.compile(r"\\(\d{1,2})|\\g<(\w+)>|\{([^{}]*)\}|\\([\\{}])|(\\.?|[{}])", re.DOTALL)
_GROUP_IN_EXPRESSION = re.compile(r"\\(\d{1,2})|\\g<(\w+)>")


@dataclass(frozen=True)
class Template:
    """A target name with holes: ``parts`` are text, ``("group", name or number)`` or ``("size", expression)``."""

    text: str
    parts: tuple[str | tuple[str, str], ...]

    def groups(self) -> Iterator[str]:
        """The groups that the template names, numbers as digits."""
        for part in self.parts:
            if not isinstance(part, str) and part[0] == "group":
                yield part[1]


@lru_cache(maxsize=8192)
def parse_template(text: str) -> Template:
    r"""Read a template: ``\1``, ``\g<name>`` and ``{expression}``; ``\\``, ``\{`` and ``\}`` are the signs themselves.

    Raises:
        RemapError: ``remap_template`` for a stray backslash or bracket.
    """
    parts: list[str | tuple[str, str]] = []
    at = 0
    for match in _TEMPLATE_PART.finditer(text):
        number, name, expression, sign, stray = match.groups()
        if stray:
            raise RemapError(
                f"template {text!r} has a stray {stray!r}",
                code="remap_template",
                hint=r"a template is plain text with \1, \g<name> and {expression}",
                template=text,
            )
        if match.start() > at:
            parts.append(text[at : match.start()])
        if sign:
            parts.append(sign)
        else:
            parts.append(("group", number or name) if number or name else ("size", normalise(expression)))
        at = match.end()
    if at < len(text):
        parts.append(text[at:])
    return Template(text, tuple(parts))


def literal_template(text: str) -> str:
    """The template that stands for a text as it is."""
    return re.sub(r"[\\{}]", r"\\\g<0>", text)


@lru_cache(maxsize=8192)
def normalise(expression: str) -> str:
    r"""Spell the groups of an expression as names: ``\1 // 4`` becomes ``_1 // 4``, ``\g<n>`` becomes ``n``."""
    return _GROUP_IN_EXPRESSION.sub(lambda match: f"_{match[1]}" if match[1] else match[2], expression)
