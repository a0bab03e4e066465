"""Context of problems: the name of the absent tensor, its file, and the closest existing name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from port_kit.remap.expected_sources import expected_sources
from port_kit.remap.names import template_of
from port_kit.remap.problems import SHOWN, Names, Problem, closest_match
from port_kit.remap.rule import Rules

#: Equally likely names that are listed for one gap.
_ALTERNATIVES = 4
_ABSENT = ("remap_missing", "remap_incomplete_group")


def add_context(
    problems: Sequence[Problem],
    rules: Rules,
    sources: Mapping[str, str],
    targets: Collection[str],
    sizes: Mapping[str, int],
) -> list[Problem]:
    """Return the problems, those that are shown with their context.

    A target that no source fills is traced back to the source name that the rules expect. A source that no rule matches
    is compared with those names first, because a renamed tensor results in both problems.

    Args:
        problems: all problems of a plan.
        rules: the rule set.
        sources: ``{name: file}`` of the checkpoint; the file may be empty.
        targets: the names of the module.
        sizes: named sizes, all of them integers.
    """
    result = list(problems)
    unexpected = Names(problem.source for problem in problems if problem.code == "remap_unexpected")
    present = _Present(sources)
    known = Names([*targets, *(name for name in sources if name not in unexpected)])
    absent: list[str] = []
    for at, problem in enumerate(result[:SHOWN]):
        if problem.code in _ABSENT and not problem.source:
            names = _expected(problem, rules, present, sizes)
            absent += [name for names_of_part in names for name in names_of_part.split(" or ")]
            result[at] = _with_absent(problem, names, sources, present.names, unexpected)
    for at, problem in enumerate(result[:SHOWN]):
        if problem.code == "remap_unexpected":
            near = closest_match(problem.source, absent) or closest_match(problem.target or problem.source, known)
            result[at] = replace(problem, near="" if near == problem.source else near)
        elif problem.source and not problem.file:
            result[at] = replace(problem, file=sources.get(problem.source, ""))
    return result


class _Present:
    """The names of a checkpoint and their parts."""

    def __init__(self, sources: Iterable[str]) -> None:
        self.names = Names(sources)

    @cached_property
    def parts(self) -> set[str]:
        """All modules that contain a tensor, and the last parts of the names with their dot."""
        return {part for name in self.names for part in (*_modules(name), f".{name.rpartition('.')[2]}")}

    def likeness(self, name: str) -> tuple[bool, bool, int]:
        """Return the existing parts of an absent name: its template, its last part, the number of its modules."""
        depth = sum(module in self.parts for module in _modules(name))
        return template_of(name) in self.names.templates, f".{name.rpartition('.')[2]}" in self.parts, depth


def _expected(problem: Problem, rules: Rules, present: _Present, sizes: Mapping[str, int]) -> list[str]:
    """Return the absent source names of a gap, one for each missing part: the most similar to existing names.

    A rule may have a number that its target does not have; equally likely names are listed together.
    """
    found = []
    for part in problem.missing or ("",):
        names = [name for name in expected_sources(rules, problem.target, part, sizes) if name not in present.names]
        best = max(map(present.likeness, names), default=None)
        equal = [name for name in names if present.likeness(name) == best]
        if equal:
            found.append(" or ".join(equal[:_ALTERNATIVES]))
    return found


def _modules(name: str) -> Iterator[str]:
    """Yield all modules that contain a tensor."""
    at = name.find(".")
    while at >= 0:
        yield name[:at]
        at = name.find(".", at + 1)


def _with_absent(
    problem: Problem, names: list[str], sources: Mapping[str, str], known: Names, unexpected: Names
) -> Problem:
    if not names:
        return replace(problem, near=closest_match(problem.target, known))
    first = names[0].partition(" or ")[0]
    near = closest_match(first, unexpected) or closest_match(first, known, cutoff=0.4)
    files = {*sources.values()}
    file = files.pop() if len(files) == 1 else sources.get(near, "")
    where = f"missing from {file}" if file else "missing"
    message = f"{problem.message}: {', '.join(names)} {'is' if len(names) == 1 else 'are'} {where}"
    return replace(problem, message=message, source=first, file=file, near=near)
