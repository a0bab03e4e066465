"""From gaps to names that their reader knows: which tensor is absent, from which file, and what comes nearest to it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from port_kit.remap.expected import expected_sources
from port_kit.remap.problems import SHOWN, Problem, nearest, template_of
from port_kit.remap.rules import RuleSet

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
    strangers = [problem.source for problem in problems if problem.code == "remap_unexpected"]
    absent: list[str] = []
    shown = range(min(SHOWN, len(result)))
    for at in shown:
        if result[at].code in _ABSENT and not result[at].source:
            names = _expected(result[at], rules, sources, sizes)
            absent += names
            result[at] = _with_absent(result[at], names, sources, strangers)
    for at in shown:
        problem = result[at]
        if problem.code == "remap_unexpected":
            known = [*targets, *(name for name in sources if name not in strangers)]
            near = nearest(problem.source, absent) or nearest(problem.target or problem.source, known)
            result[at] = replace(problem, near=near)
        elif problem.source and not problem.file:
            result[at] = replace(problem, file=sources.get(problem.source, ""))
    return result


def _expected(problem: Problem, rules: RuleSet, sources: Mapping[str, str], sizes: Mapping[str, int]) -> list[str]:
    """The absent source names of a gap, one for each missing part: those that look most like what is there."""
    templates = {template_of(name) for name in sources}
    leaves = {name.rpartition(".")[2] for name in sources}

    def likeness(name: str) -> tuple[bool, bool]:
        return template_of(name) in templates, name.rpartition(".")[2] in leaves

    found = []
    for part in problem.missing or ("",):
        names = [name for name in expected_sources(rules, problem.target, part, sizes) if name not in sources]
        if names:
            found.append(
                max(names, key=lambda name: (template_of(name) in templates, name.rpartition(".")[2] in leaves))
            )
    return found


def _with_absent(problem: Problem, names: list[str], sources: Mapping[str, str], strangers: list[str]) -> Problem:
    if not names:
        return replace(problem, near=nearest(problem.target, sources))
    near = nearest(names[0], strangers) or nearest(names[0], sources, cutoff=0.4)
    files = {*sources.values()}
    file = files.pop() if len(files) == 1 else sources.get(near, "")
    where = f"missing from {file}" if file else "missing"
    message = f"{problem.message}: {', '.join(names)} {'is' if len(names) == 1 else 'are'} {where}"
    return replace(problem, message=message, source=names[0], file=file, near=near)
