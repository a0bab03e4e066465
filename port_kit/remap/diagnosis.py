"""From gaps to names that their reader knows: which tensor is absent, from which file, and what comes nearest to it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from port_kit.remap.expected import expected_sources
from port_kit.remap.problems import SHOWN, Names, Problem, nearest, template_of
from port_kit.remap.rules import RuleSet

#: Names that fit a gap equally well, of which so many are told.
_ALTERNATIVES = 4
_ABSENT = ("remap_missing", "remap_incomplete_group")


def diagnose(
    problems: Sequence[Problem],
    rules: RuleSet,
    sources: Mapping[str, str],
    targets: Collection[str],
    sizes: Mapping[str, int],
) -> list[Problem]:
    """Complete the problems that are shown.

    A target that nothing fills is traced back to the source name that the rules would have taken, and a source that
    no rule takes is compared with those names first: a renamed tensor shows up as both.

    Args:
        problems: as the plan or the load found them.
        rules: the rule set.
        sources: ``{name: file}`` of the checkpoint; the file may be empty.
        targets: the names of the module.
        sizes: named sizes, all of them integers.
    """
    result = list(problems)
    strangers = Names(problem.source for problem in problems if problem.code == "remap_unexpected")
    present = _Present(sources)
    known = Names([*targets, *(name for name in sources if name not in strangers)])
    absent: list[str] = []
    shown = range(min(SHOWN, len(result)))
    for at in shown:
        if result[at].code in _ABSENT and not result[at].source:
            names = _expected(result[at], rules, present, sizes)
            absent += [name for names_of_part in names for name in names_of_part.split(" or ")]
            result[at] = _with_absent(result[at], names, sources, present.names, strangers)
    for at in shown:
        problem = result[at]
        if problem.code == "remap_unexpected":
            near = nearest(problem.source, absent) or nearest(problem.target or problem.source, known)
            result[at] = replace(problem, near=near)
        elif problem.source and not problem.file:
            result[at] = replace(problem, file=sources.get(problem.source, ""))
    return result


class _Present:
    """What the names of a checkpoint are made of."""

    def __init__(self, sources: Iterable[str]) -> None:
        self.names = Names(sources)

    @cached_property
    def leaves(self) -> set[str]:
        """Last parts of the names."""
        return {name.rpartition(".")[2] for name in self.names}

    @cached_property
    def modules(self) -> set[str]:
        """All modules above a tensor."""
        return {module for name in self.names for module in _modules(name)}

    def likeness(self, name: str) -> tuple[bool, bool, int]:
        """How much of a name that is not there is there."""
        depth = sum(module in self.modules for module in _modules(name))
        return template_of(name) in self.names.templates, name.rpartition(".")[2] in self.leaves, depth


def _expected(problem: Problem, rules: RuleSet, present: _Present, sizes: Mapping[str, int]) -> list[str]:
    """The absent source names of a gap, one for each missing part: those that look most like what is there.

    A rule may leave a number open that its target does not have; names that fit equally well are told together.
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
    """All modules above a tensor."""
    at = name.find(".")
    while at >= 0:
        yield name[:at]
        at = name.find(".", at + 1)


def _with_absent(
    problem: Problem, names: list[str], sources: Mapping[str, str], known: Names, strangers: Names
) -> Problem:
    if not names:
        return replace(problem, near=nearest(problem.target, known))
    first = names[0].partition(" or ")[0]
    near = nearest(first, strangers) or nearest(first, known, cutoff=0.4)
    files = {*sources.values()}
    file = files.pop() if len(files) == 1 else sources.get(near, "")
    where = f"missing from {file}" if file else "missing"
    message = f"{problem.message}: {', '.join(names)} {'is' if len(names) == 1 else 'are'} {where}"
    return replace(problem, message=message, source=first, file=file, near=near)
