"""A plan as a map: what every target tensor is made of, in a schema that other tools and other conversions share.

Each entry is ``{"from": [sources], "op": ..., "detail": {...}}``. Ops: ``copy``; ``reshape {shape}``;
``transpose {perm}``; ``split {dim, start, stop[, reshape]}``, one slice; ``reorder {dim, runs[, reshape]}``,
slices of one source in a new order; ``concat {dim, parts}`` with ``{source, start, stop}`` a part, both None for a
whole source; ``stack {dim, parts}`` with an entry a part. What has no name there is ``computed {steps}``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from port_kit.remap.boxes import Shape, whole
from port_kit.remap.lower import Write
from port_kit.remap.plan import Plan
from port_kit.remap.steps import Call, Cast, Fill, Permute, Reorder, Reshape, Run, Step, Take, back

Entry = dict[str, Any]


def plan_map(plan: Plan) -> dict[str, Entry]:
    """The map of all targets that a plan writes, in the target's order.

    Works on plans with problems too (:func:`port_kit.remap.plan.check`): targets that nothing writes are not in it.
    """
    by_target = plan.by_target()
    return {name: _entry(by_target[name], plan.target[name].shape, plan) for name in plan.target if name in by_target}


def _entry(writes: Sequence[Write], shape: Shape, plan: Plan) -> Entry:
    """The entry of a target, or of one item of a stack."""
    ordered = sorted(writes, key=lambda write: write.region)
    if len(ordered) == 1 and ordered[0].region == whole(shape):
        return _single(ordered[0], plan, shape)
    if any(write.join is not None for write in ordered):
        return _computed(ordered)
    if _is_stack(ordered, shape):
        return _stack(ordered, shape, plan)
    return _concat(ordered, shape, plan)


def _is_stack(writes: Sequence[Write], shape: Shape) -> bool:
    """Whether every part fills one item of the first axis and says so: by its op, or with one number for that axis."""
    if len(shape) < 2 or any(stop - start != 1 for start, stop in (write.region[0] for write in writes)):
        return False
    return all(len(write.steps) > 0 or write.shape == shape[1:] for write in writes) and all(
        any(op.name == "stack" for op in write.rule.op) or write.rule.into for write in writes
    )


def _stack(writes: Sequence[Write], shape: Shape, plan: Plan) -> Entry:
    items: dict[int, list[Write]] = {}
    for write in writes:
        items.setdefault(write.region[0][0], []).append(write)
    parts = [_item(item, shape[1:], plan) for item in items.values()]
    names = [name for part in parts for name in part["from"]]
    return {"from": names, "op": "stack", "detail": {"dim": 0, "parts": parts}}


def _item(writes: Sequence[Write], shape: Shape, plan: Plan) -> Entry:
    """One item of a stack: its writes without the stacked axis."""
    inner = [_without_axis(write) for write in writes]
    return _entry(inner, shape, plan)


def _without_axis(write: Write) -> Write:
    steps = write.steps
    if steps and isinstance(steps[-1], Reshape) and steps[-1].after == (1, *steps[-1].before):
        steps = steps[:-1]
    return write._replace(steps=steps, region=write.region[1:], shape=write.shape[1:])


def _concat(writes: Sequence[Write], shape: Shape, plan: Plan) -> Entry:
    dim = next((axis for axis in range(len(shape)) if len({write.region[axis] for write in writes}) == len(writes)), 0)
    parts = [_part(write, dim, plan) for write in writes]
    return {"from": [write.source for write in writes], "op": "concat", "detail": {"dim": dim, "parts": parts}}


def _part(write: Write, dim: int, plan: Plan) -> Entry:
    steps = _plain(write.steps)
    if not steps:
        return {"source": write.source, "start": None, "stop": None}
    if len(steps) == 1 and isinstance(steps[0], Take) and _cut_axes(steps[0]) == [dim]:
        start, stop = steps[0].box[dim]
        return {"source": write.source, "start": start, "stop": stop}
    return _single(write, plan, write.shape)


def _single(write: Write, plan: Plan, shape: Shape) -> Entry:
    """The entry of a region that one source fills."""
    op, detail = _op(_plain(write.steps), plan.source[write.source].shape, shape)
    return {"from": [write.source], "op": op, "detail": detail}


def _op(steps: Sequence[Step], given: Shape, shape: Shape) -> tuple[str, dict[str, Any]]:
    if not steps:
        return "copy", {}
    if all(isinstance(step, Reshape) for step in steps):
        return "reshape", {"shape": list(shape)}
    if len(steps) == 1 and isinstance(steps[0], Permute):
        return "transpose", {"perm": list(steps[0].perm)}
    if any(isinstance(step, (Call, Fill)) for step in steps):
        return "computed", {"steps": [_name(step) for step in steps]}
    dim = next((_axis(step) for step in steps if isinstance(step, (Take, Reorder))), 0)
    runs = _runs(steps, given, shape, dim)
    if runs is None:
        return "computed", {"steps": [_name(step) for step in steps]}
    kept = (*given[:dim], sum(stop - start for start, stop in runs), *given[dim + 1 :])
    reshape = {"reshape": list(shape)} if kept != shape else {}
    if len(runs) == 1:
        return "split", {"dim": dim, "start": runs[0][0], "stop": runs[0][1], **reshape}
    return "reorder", {"dim": dim, "runs": [list(run) for run in runs], **reshape}


def _plain(steps: Sequence[Step]) -> list[Step]:
    """The steps that move elements."""
    return [
        step
        for step in steps
        if not isinstance(step, Cast) and not (isinstance(step, Take) and step.box == whole(step.before))
    ]


def _cut_axes(step: Take) -> list[int]:
    return [axis for axis, pair in enumerate(step.box) if pair != (0, step.before[axis])]


def _axis(step: Take | Reorder) -> int:
    return step.dim if isinstance(step, Reorder) else (_cut_axes(step) or [0])[0]


def _runs(steps: Sequence[Step], given: Shape, shape: Shape, dim: int) -> list[Run] | None:
    """The slices of one source axis that make up the result, in order; None where whole slices do not."""
    axis = 0 if len(shape) != len(given) else dim
    count = shape[axis] if shape else 0
    lines = [back(steps, [_line(steps[-1].after, axis, at)]) for at in range(count)]
    if sum(len(boxes) for boxes in lines) == 0 or steps[-1].after != shape:
        return None
    runs: list[Run] = []
    for boxes in lines:
        for box in sorted(boxes):
            if any(pair != (0, extent) for at, (pair, extent) in enumerate(zip(box, given, strict=True)) if at != dim):
                return _one_slice(lines, given, dim)
            start, stop = box[dim]
            if runs and runs[-1][1] == start:
                runs[-1] = (runs[-1][0], stop)
            else:
                runs.append((start, stop))
    return runs


def _one_slice(lines: Sequence[Sequence[tuple[Run, ...]]], given: Shape, dim: int) -> list[Run] | None:
    """One item of an axis that the result no longer has (an expert out of a stack), its elements in order."""
    boxes = [box for line in lines for box in line]
    items = {box[dim] for box in boxes}
    ordered = [tuple(start for start, _ in box) for box in boxes]
    if len(items) == 1 and ordered == sorted(ordered):
        return [next(iter(items))]
    return None


def _line(shape: Shape, axis: int, at: int) -> tuple[Run, ...]:
    return tuple((at, at + 1) if place == axis else (0, extent) for place, extent in enumerate(shape))


def _computed(writes: Sequence[Write]) -> Entry:
    joins = sorted({write.join.name for write in writes if write.join is not None})
    return {"from": [write.source for write in writes], "op": "computed", "detail": {"steps": joins}}


def _name(step: Step) -> str:
    return step.name if isinstance(step, Call) else type(step).__name__.lower()
