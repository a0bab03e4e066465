"""Context of problems: the name of the absent tensor, its file, and the closest existing name.

To find the source names of a missing target, rules are inverted. The placeholders of a template are read from the
target (and from the missing shard or part), and the source pattern is spelled out with them. A spelling counts only if
the rule maps it to exactly that target.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

from port_kit.errors import RemapError
from port_kit.manifest import Manifest
from port_kit.remap.matching_time import REPEATS, parse_pattern, sre
from port_kit.remap.names import template_of
from port_kit.remap.patterns import compile_pattern, parse_template
from port_kit.remap.problems import SHOWN, Names, Problem, closest_match
from port_kit.remap.resolve import expand
from port_kit.remap.resolve_ops import Scope
from port_kit.remap.rule import Rule, Rules, Sizes

#: Largest number of spellings of one pattern, and of layer numbers for a placeholder with no known value.
MAX_SPELLINGS = 512
MAX_NUMBER = 128
#: Equally likely names that are listed for one gap.
_ALTERNATIVES = 4
_DIGIT = [(sre.IN, [(sre.CATEGORY, sre.CATEGORY_DIGIT)])]
_ABSENT = ("remap_missing", "remap_incomplete_group")


def add_context(
    problems: Sequence[Problem], rules: Rules, source: Manifest, target: Manifest, sizes: Sizes
) -> list[Problem]:
    """Return the problems, those that are shown with their context.

    A target that no source fills is traced back to the source name that the rules expect. A source that no rule matches
    is compared with those names first, because a renamed tensor results in both problems.

    Args:
        problems, rules, source, target, sizes: those of one plan; all sizes are integers.
    """
    result = list(problems)
    unexpected = Names(problem.source for problem in problems if problem.code == "remap_unexpected")
    present = _Present(source)
    known = Names([*target, *(name for name in source if name not in unexpected)])
    absent: list[str] = []
    for at, problem in enumerate(result[:SHOWN]):
        if problem.code in _ABSENT and not problem.source:
            names = _expected(problem, rules, present, sizes)
            absent += [name for names_of_part in names for name in names_of_part.split(" or ")]
            result[at] = _with_absent(problem, names, source, present, unexpected)
    for at, problem in enumerate(result[:SHOWN]):
        if problem.code == "remap_unexpected":
            near = closest_match(problem.source, absent) or closest_match(problem.target or problem.source, known)
            result[at] = replace(problem, near="" if near == problem.source else near)
        elif problem.source and problem.source in source and not problem.file:
            result[at] = replace(problem, file=source[problem.source].file)
    return result


class _Present(Names):
    """The names of a checkpoint and their parts."""

    @cached_property
    def parts(self) -> set[str]:
        """All modules that contain a tensor, and the last parts of the names with their dot."""
        return {part for name in self for part in (*_modules(name), f".{name.rpartition('.')[2]}")}

    def likeness(self, name: str) -> tuple[bool, bool, int]:
        """Return the existing parts of an absent name: its template, its last part, the number of its modules."""
        depth = sum(module in self.parts for module in _modules(name))
        return template_of(name) in self.templates, f".{name.rpartition('.')[2]}" in self.parts, depth


def _expected(problem: Problem, rules: Rules, present: _Present, sizes: Sizes) -> list[str]:
    """Return the absent source names of a gap, one for each missing part: the most similar to existing names.

    A rule may have a number that its target does not have; equally likely names are listed together.
    """
    found = []
    for part in problem.missing or ("",):
        names = [name for name in expected_sources(rules, problem.target, part, sizes) if name not in present]
        best = max(map(present.likeness, names), default=None)
        equal = [name for name in names if present.likeness(name) == best]
        if equal:
            found.append(" or ".join(equal[:_ALTERNATIVES]))
    return found


def _modules(name: str) -> Iterator[str]:
    """Return all modules that contain a tensor, from the outermost."""
    return itertools.accumulate(name.split(".")[:-1], "{}.{}".format)


def _with_absent(problem: Problem, names: list[str], source: Manifest, known: Names, unexpected: Names) -> Problem:
    if not names:
        return replace(problem, near=closest_match(problem.target, known))
    first = names[0].partition(" or ")[0]
    near = closest_match(first, unexpected) or closest_match(first, known, cutoff=0.4)
    files = {spec.file for spec in source.values()}
    file = files.pop() if len(files) == 1 else source[near].file if near else ""
    found = f"missing from {file}" if file else "missing"
    message = f"{problem.message}: {', '.join(names)} {'is' if len(names) == 1 else 'are'} {found}"
    return replace(problem, message=message, source=first, file=file, near=near)


def expected_sources(rules: Rules, target: str, part: str, sizes: Sizes) -> list[str]:
    """Return the source names that would fill a target, in the order of the rules.

    There are none if no rule maps there, or its pattern cannot be spelled out.

    Args:
        part: the shard of a fused target, or the part of a join; empty for the complete target.
    """
    found = (name for rule in rules if rule.source and rule.target for name in _spellings(rule, target, part, sizes))
    return list(dict.fromkeys(found))


def _spellings(rule: Rule, target: str, part: str, sizes: Sizes) -> Iterator[str]:
    for template, shard in zip(rule.targets, rule.shards, strict=True):
        held = _held(template, target)
        held_by_part = _held(shard, part) if shard and part else {}
        if held is None or held_by_part is None or any(held.get(k, v) != v for k, v in held_by_part.items()):
            continue
        pattern = compile_pattern(rule.source)
        known = {str(pattern.groupindex.get(name, name)): value for name, value in {**held, **held_by_part}.items()}
        for name in itertools.islice(_spell(list(parse_pattern(rule.source)), known), MAX_SPELLINGS):
            match = pattern.fullmatch(name)
            if match is None:
                continue
            scope = Scope(sizes, rule.label, name, match, ())
            with suppress(RemapError):
                if expand(template, match, scope) == target and (not part or expand(shard, match, scope) == part):
                    yield name


def _held(template: str, text: str) -> dict[str, str] | None:
    """Return the values of a template's groups in a text, or None if the template cannot yield the text."""
    match = re.fullmatch(_reader(template), text)
    return None if match is None else {name[1:]: value for name, value in match.groupdict().items()}


@lru_cache(maxsize=1024)
def _reader(template: str) -> str:
    """Return the template as a pattern: groups by name, arithmetic as any number."""
    pieces, seen = [], set()
    for piece in parse_template(template).parts:
        if isinstance(piece, str):
            pieces.append(re.escape(piece))
        elif piece[0] == "size":
            pieces.append(r"\d+")
        else:
            pieces.append(f"(?P=_{piece[1]})" if piece[1] in seen else f"(?P<_{piece[1]}>.*?)")
            seen.add(piece[1])
    return "".join(pieces)


def _spell(tree: list[Any], known: Mapping[str, str]) -> Iterator[str]:
    """Yield the spellings of a parsed pattern with the known values of its groups."""
    if not tree:
        yield ""
        return
    code, value = tree[0]
    for head in _spell_one(code, value, known):
        for tail in _spell(tree[1:], known):
            yield head + tail


def _spell_one(code: Any, value: Any, known: Mapping[str, str]) -> Iterator[str]:
    if code is sre.LITERAL:
        yield chr(value)
    elif code is sre.SUBPATTERN:
        if str(value[0]) in known:
            yield known[str(value[0])]
        else:
            yield from _spell(list(value[3]), known)
    elif code is sre.BRANCH:
        for branch in value[1]:
            yield from _spell(list(branch), known)
    elif code in REPEATS and value[:2] == (0, 1):
        yield from _spell(list(value[2]), known)
        yield ""
    elif code in REPEATS and list(value[2]) == _DIGIT:
        yield from map(str, range(MAX_NUMBER))
    elif code is sre.IN and all(kind is sre.LITERAL for kind, _ in value):
        yield from (chr(character) for _, character in value)
    elif code is sre.IN and all(kind is sre.RANGE for kind, _ in value):
        yield from (chr(character) for _, (low, high) in value for character in range(low, high + 1))
