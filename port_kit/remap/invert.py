"""Inversion of a plan: a rule set that maps the target's names back to the source's.

The inverse is made of the plan's copy tasks by layer template, so its regions and shapes are numbers. A transform, or a
part of a reshaped tensor, cannot be expressed backwards and is an error; :mod:`port_kit.remap.export` can restore it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from port_kit.errors import RemapError
from port_kit.escape import quoted
from port_kit.regions import Region, Shape, full_region, region_text
from port_kit.remap.names import template_of
from port_kit.remap.patterns import generalize_names, literal_template
from port_kit.remap.plan import Plan, check
from port_kit.remap.problems import raise_problems, remap_error
from port_kit.remap.resolve import CopyTask
from port_kit.remap.rules import Op, Rule, RuleSet
from port_kit.remap.tensor_ops import Cast, Fill, Permute, Reorder, Reshape, Slice, TensorOp


def invert(plan: Plan) -> RuleSet:
    """Return rules from the plan's targets to its sources.

    Raises:
        RemapError: ``remap_op`` for an operation that rules cannot express backwards.
    """
    groups: dict[object, list[CopyTask]] = defaultdict(list)
    first: dict[str, object] = {}
    copies = []
    for task in plan.tasks:
        copy: object = "parts" if task.rule.take else task.rule  # several rules may each copy one source
        if first.setdefault(task.source, copy) != copy:
            take = _part(task.region, plan.target[task.target].shape)
            copies.append(Rule(re.escape(task.target), drop=f"a copy of {task.source}", take=take))
            continue
        names = template_of(task.source), template_of(task.target)
        groups[names, task.ops, task.region, plan.source[task.source], plan.target[task.target].shape].append(task)
    rules = [rule for group in groups.values() for rule in _rules(plan, group)] + copies
    rules += [Rule(target=re.escape(name), keep=f"not in the target: {why}") for name, why in plan.dropped.items()]
    rules += [Rule(source=re.escape(name), drop=f"not in the source: {why}") for name, why in plan.kept.items()]
    made = RuleSet(f"{plan.rules.name}_inverse", tuple(rules), allow_downcast=True)
    raise_problems(check(made, plan.target, plan.source).problems, f"the inverse of {plan.rules.name}")
    return made


def _rules(plan: Plan, tasks: Sequence[CopyTask]) -> list[Rule]:
    """Return one rule for all layers if the source's numbers follow from the target's, else one per layer."""
    body = _body(plan, tasks[0])
    found = generalize_names([task.target for task in tasks], [[task.source] for task in tasks])
    if found is not None and sum(re.fullmatch(found[0], name) is not None for name in plan.target) == len(tasks):
        return [Rule(found[0], found[1][0], **body)]
    return [Rule(re.escape(task.target), literal_template(task.source), **body) for task in tasks]


def _body(plan: Plan, task: CopyTask) -> dict[str, Any]:
    """Return the fields of the inverse rule: ``take`` and ``into`` change places."""
    spec, target = plan.source[task.source], plan.target[task.target]
    if task.join is not None:
        raise _one_way(task, f"{task.join.name} joins several sources")
    into, forward = full_region(spec.shape), task.ops
    if forward and isinstance(forward[0], Slice):
        into, forward = forward[0].region, forward[1:]
    ops = [inverse for op in reversed(forward) for inverse in _backwards(op, task)]
    if spec.dtype != target.dtype:
        ops.append(Op.of("cast", dtype=spec.dtype))
    return {"op": tuple(ops), "take": _part(task.region, target.shape), "into": _part(into, spec.shape)}


def _part(region: Region, shape: Shape) -> str:
    """Return the text of a region, empty if it is the full tensor."""
    return "" if region == full_region(shape) else region_text(region)


def _backwards(op: TensorOp, task: CopyTask) -> list[Op]:
    if isinstance(op, Reshape):
        return [Op.of("reshape", shape=op.before)]
    if isinstance(op, Permute):
        return [Op.of("transpose", perm=tuple(sorted(range(len(op.perm)), key=op.perm.__getitem__)))]
    if isinstance(op, Reorder):
        moves = sorted((start, at, length) for at, start, length in op.moves())
        if sum(length for _, _, length in moves) != op.before[op.dim]:
            raise _one_way(task, "a reorder leaves elements out")
        return [Op.of("reorder", dim=op.dim, runs=tuple((at, at + length) for _, at, length in moves))]
    if isinstance(op, Cast):
        return []
    if isinstance(op, Fill):
        raise _one_way(task, "puts one value into many elements")
    raise _one_way(task, "takes a part after a reshape" if isinstance(op, Slice) else f"uses the transform {op.name}")


def _one_way(task: CopyTask, why: str) -> RemapError:
    hint = "restore the tensors with the plan: port-kit rules export"
    return remap_error("remap_op", f"rule {quoted(task.rule.label)} cannot be written backwards: it {why}", hint)
