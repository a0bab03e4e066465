"""An inverse rule set, worked out from a plan: rules that bring the target's names back to the source's.

The inverse is made of the plan's writes, layer template by layer template, so its boxes and shapes are numbers. What a
rule cannot say backwards (a transform, a part taken from inside a reshape) is an error; :mod:`port_kit.remap.export`
still goes that way.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from port_kit.errors import RemapError
from port_kit.remap.boxes import Box, Shape, whole
from port_kit.remap.lower import Write
from port_kit.remap.names import split_numbers
from port_kit.remap.patterns import literal_template
from port_kit.remap.plan import Plan, check
from port_kit.remap.problems import raise_problems
from port_kit.remap.rules import Op, Rule, RuleSet
from port_kit.remap.steps import Cast, Fill, Permute, Reorder, Reshape, Step, Take

Rows = list[tuple[tuple[int, ...], tuple[int, ...]]]


def invert(plan: Plan) -> RuleSet:
    """Return rules from the plan's targets to its sources.

    Raises:
        RemapError: ``remap_op`` for what rules cannot say backwards.
    """
    groups: dict[tuple[object, ...], tuple[Write, Rows]] = {}
    for write in plan.writes:
        source, source_numbers = split_numbers(write.source)
        target, target_numbers = split_numbers(write.target)
        key = (source, target, write.steps, write.region, plan.source[write.source], plan.target[write.target].shape)
        groups.setdefault(key, (write, []))[1].append((target_numbers, source_numbers))
    rules = [rule for write, rows in groups.values() for rule in _rules(plan, write, rows)]
    rules += [
        Rule(target=re.escape(name), keep=f"not in the target: {reason}") for name, reason in plan.dropped.items()
    ]
    for name, reason in plan.kept.items():
        rules.append(Rule(source=re.escape(name), drop=f"not in the source: {reason}"))
    made = RuleSet(f"{plan.rules.name}_inverse", tuple(rules), narrow=True)
    raise_problems(check(made, plan.target, plan.source).problems, f"the inverse of {plan.rules.name}")
    return made


def _rules(plan: Plan, write: Write, rows: Rows) -> list[Rule]:
    """One rule for all layers where the source's numbers follow from the target's, else one a layer."""
    body = _body(plan, write)
    source, target = split_numbers(write.source)[0], split_numbers(write.target)[0]
    fixed = _constants([to for to, _ in rows])
    fillings = _fillings(rows, fixed)
    if fillings is not None and _covers_all(plan, target, rows, fixed):
        pieces = [re.escape(piece) for piece in target.split("#")]
        holes = [r"(\d+)" if at not in fixed else str(fixed[at]) for at in range(len(pieces) - 1)]
        pattern = pieces[0] + "".join(hole + piece for hole, piece in zip(holes, pieces[1:], strict=True))
        return [Rule(pattern, _fill(literal_template(source), fillings), **body)]
    return [
        Rule(re.escape(_fill(target, to)), literal_template(_fill(source, numbers)), **body) for to, numbers in rows
    ]


def _constants(rows: Sequence[tuple[int, ...]]) -> dict[int, int]:
    """The positions at which all rows have the same number, where there are several rows."""
    if len(rows) < 2:
        return dict(enumerate(rows[0]))
    return {at: column[0] for at, column in enumerate(zip(*rows, strict=True)) if len(set(column)) == 1}


def _covers_all(plan: Plan, template: str, rows: Rows, fixed: dict[int, int]) -> bool:
    """Whether the rows are all targets that the rule's pattern would match; it must not match more."""
    found = [numbers for name in plan.target for text, numbers in [split_numbers(name)] if text == template]
    count = sum(all(numbers[at] == value for at, value in fixed.items()) for numbers in found)
    return count == len({numbers for numbers, _ in rows})


def _fillings(rows: Rows, fixed: dict[int, int]) -> list[str] | None:
    """For each number of the source the group of the target that it always equals, or the number where it is one."""
    if not len({source for _, source in rows}) == len({target for target, _ in rows}) == len(rows):
        return None
    free = [at for at in range(len(rows[0][0])) if at not in fixed]
    constant = _constants([source for _, source in rows])
    fillings = []
    for at in range(len(rows[0][1])):
        equal = [of for of in free if all(target[of] == source[at] for target, source in rows)]
        if at in constant:
            fillings.append(str(constant[at]))
        elif equal:
            fillings.append(rf"\{free.index(equal[0]) + 1}")
        else:
            return None
    return fillings


def _fill(template: str, fillings: Sequence[object]) -> str:
    pieces = template.split("#")
    return pieces[0] + "".join(str(value) + piece for value, piece in zip(fillings, pieces[1:], strict=True))


def _body(plan: Plan, write: Write) -> dict[str, Any]:
    """The fields of the inverse rule: what was written is taken, what was taken is written into."""
    spec, target = plan.source[write.source], plan.target[write.target]
    if write.join is not None:
        raise _one_way(write, f"{write.join.name} joins several sources")
    steps = list(write.steps)
    into: Box = whole(spec.shape)
    shape: Shape = spec.shape
    if steps and isinstance(steps[0], Take):
        into, shape = steps[0].box, steps.pop(0).after
    ops = [op for step in reversed(steps) for op in _backwards(step, write)]
    if spec.dtype != target.dtype:
        ops.append(Op.of("cast", dtype=spec.dtype))
    fields: dict[str, object] = {"op": tuple(ops)}
    if write.region != whole(target.shape):
        fields["take"] = _text(write.region)
    if into != whole(spec.shape):
        fields["into"] = _text(into)
    assert not steps or steps[0].before == shape
    return fields


def _backwards(step: Step, write: Write) -> list[Op]:
    if isinstance(step, Reshape):
        return [Op.of("reshape", shape=step.before)]
    if isinstance(step, Permute):
        return [Op.of("transpose", perm=tuple(sorted(range(len(step.perm)), key=step.perm.__getitem__)))]
    if isinstance(step, Reorder):
        pieces = sorted((start, at, length) for at, start, length in step.pieces())
        if sum(length for _, _, length in pieces) != step.before[step.dim]:
            raise _one_way(write, "a reorder leaves elements out")
        return [Op.of("reorder", dim=step.dim, runs=tuple((at, at + length) for _, at, length in pieces))]
    if isinstance(step, Cast):
        return []
    if isinstance(step, Fill):
        raise _one_way(write, "puts one value into many elements")
    what = "takes a part after a reshape" if isinstance(step, Take) else f"uses the transform {step.name}"
    raise _one_way(write, what)


def _text(box: Box) -> str:
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"


def _one_way(write: Write, why: str) -> RemapError:
    return RemapError(
        f"rule {write.rule.label!r} cannot be written backwards: it {why}",
        code="remap_op",
        hint="export goes back by the plan: port-kit rules export",
    )
