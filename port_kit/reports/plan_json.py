"""A plan as JSON: the sources and the operation of every target tensor, in the schema of the tests' known conversions.

Each entry is ``{"from": [sources], "op": ..., "detail": {...}}``. Ops: ``copy``; ``reshape {shape}``;
``transpose {perm}``; ``split {dim, start, stop[, reshape]}``, one slice; ``reorder {dim, runs[, reshape]}``,
slices of one source in a new order; ``concat {dim, parts}`` with ``{source, start, stop}`` per part, both None for a
complete source; ``stack {dim, parts}`` with an entry per part. Anything else is ``computed {ops}``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from port_kit.regions import Shape, full_region
from port_kit.remap.plan import Plan
from port_kit.remap.resolve import CopyTask
from port_kit.remap.tensor_ops import Call, Cast, Fill, Permute, Reorder, Reshape, Run, Slice, TensorOp, source_region

Entry = dict[str, Any]


def plan_map(plan: Plan) -> dict[str, Entry]:
    """Return the entries of all targets that a plan writes, in the order of the target.

    A plan may have problems (:func:`port_kit.remap.plan.check`); targets without a task are left out.
    """
    by_target = plan.by_target()
    return {name: _entry(by_target[name], plan.target[name].shape, plan) for name in plan.target if name in by_target}


def _entry(tasks: Sequence[CopyTask], shape: Shape, plan: Plan) -> Entry:
    """Return the entry of a target, or of one item of a stack."""
    ordered = sorted(tasks, key=lambda task: task.region)
    if len(ordered) == 1 and ordered[0].region == full_region(shape):
        return _single(ordered[0], plan, shape)
    if any(task.join is not None for task in ordered):
        return _computed(ordered)
    if _is_stack(ordered, shape):
        return _stack(ordered, shape, plan)
    return _concat(ordered, shape, plan)


def _is_stack(tasks: Sequence[CopyTask], shape: Shape) -> bool:
    """Return True if every part fills one item of the first axis, by its op or by one index in ``into``."""
    if len(shape) < 2 or any(stop - start != 1 for start, stop in (task.region[0] for task in tasks)):
        return False
    return all(len(task.ops) > 0 or task.shape == shape[1:] for task in tasks) and all(
        any(op.name == "stack" for op in task.rule.op) or task.rule.into for task in tasks
    )


def _stack(tasks: Sequence[CopyTask], shape: Shape, plan: Plan) -> Entry:
    items: dict[int, list[CopyTask]] = {}
    for task in tasks:
        items.setdefault(task.region[0][0], []).append(task)
    parts = [_item(item, shape[1:], plan) for item in items.values()]
    names = [name for part in parts for name in part["from"]]
    return {"from": names, "op": "stack", "detail": {"dim": 0, "parts": parts}}


def _item(tasks: Sequence[CopyTask], shape: Shape, plan: Plan) -> Entry:
    """Return the entry of one item of a stack, without the stacked axis."""
    inner = [_without_axis(task) for task in tasks]
    return _entry(inner, shape, plan)


def _without_axis(task: CopyTask) -> CopyTask:
    ops = task.ops
    if ops and isinstance(ops[-1], Reshape) and ops[-1].after == (1, *ops[-1].before):
        ops = ops[:-1]
    return task._replace(ops=ops, region=task.region[1:], shape=task.shape[1:])


def _concat(tasks: Sequence[CopyTask], shape: Shape, plan: Plan) -> Entry:
    dim = next((axis for axis in range(len(shape)) if len({task.region[axis] for task in tasks}) == len(tasks)), 0)
    parts = [_part(task, dim, plan) for task in tasks]
    return {"from": [task.source for task in tasks], "op": "concat", "detail": {"dim": dim, "parts": parts}}


def _part(task: CopyTask, dim: int, plan: Plan) -> Entry:
    ops = _plain(task.ops)
    if not ops:
        return {"source": task.source, "start": None, "stop": None}
    if len(ops) == 1 and isinstance(ops[0], Slice) and _cut_axes(ops[0]) == [dim]:
        start, stop = ops[0].region[dim]
        return {"source": task.source, "start": start, "stop": stop}
    return _single(task, plan, task.shape)


def _single(task: CopyTask, plan: Plan, shape: Shape) -> Entry:
    """Return the entry of a region that one source fills."""
    op, detail = _op(_plain(task.ops), plan.source[task.source].shape, shape)
    return {"from": [task.source], "op": op, "detail": detail}


def _op(ops: Sequence[TensorOp], given: Shape, shape: Shape) -> tuple[str, dict[str, Any]]:
    if not ops:
        return "copy", {}
    if all(isinstance(op, Reshape) for op in ops):
        return "reshape", {"shape": list(shape)}
    if len(ops) == 1 and isinstance(ops[0], Permute):
        return "transpose", {"perm": list(ops[0].perm)}
    if any(isinstance(op, (Call, Fill)) for op in ops):
        return "computed", {"ops": [_name(op) for op in ops]}
    dim = next((_axis(op) for op in ops if isinstance(op, (Slice, Reorder))), 0)
    runs = _runs(ops, given, shape, dim)
    if runs is None:
        return "computed", {"ops": [_name(op) for op in ops]}
    kept = (*given[:dim], sum(stop - start for start, stop in runs), *given[dim + 1 :])
    reshape = {"reshape": list(shape)} if kept != shape else {}
    if len(runs) == 1:
        return "split", {"dim": dim, "start": runs[0][0], "stop": runs[0][1], **reshape}
    return "reorder", {"dim": dim, "runs": [list(run) for run in runs], **reshape}


def _plain(ops: Sequence[TensorOp]) -> list[TensorOp]:
    """Return the operations that move elements."""
    return [
        op
        for op in ops
        if not isinstance(op, Cast) and not (isinstance(op, Slice) and op.region == full_region(op.before))
    ]


def _cut_axes(op: Slice) -> list[int]:
    return [axis for axis, pair in enumerate(op.region) if pair != (0, op.before[axis])]


def _axis(op: Slice | Reorder) -> int:
    return op.dim if isinstance(op, Reorder) else (_cut_axes(op) or [0])[0]


def _runs(ops: Sequence[TensorOp], given: Shape, shape: Shape, dim: int) -> list[Run] | None:
    """Return the slices of one source axis that the result consists of, in order, or None."""
    axis = 0 if len(shape) != len(given) else dim
    count = shape[axis] if shape else 0
    lines = [source_region(ops, [_line(ops[-1].after, axis, at)]) for at in range(count)]
    if sum(len(regions) for regions in lines) == 0 or ops[-1].after != shape:
        return None
    runs: list[Run] = []
    for regions in lines:
        for region in sorted(regions):
            if any(
                pair != (0, extent) for at, (pair, extent) in enumerate(zip(region, given, strict=True)) if at != dim
            ):
                return _one_slice(lines, given, dim)
            start, stop = region[dim]
            if runs and runs[-1][1] == start:
                runs[-1] = (runs[-1][0], stop)
            else:
                runs.append((start, stop))
    return runs


def _one_slice(lines: Sequence[Sequence[tuple[Run, ...]]], given: Shape, dim: int) -> list[Run] | None:
    """Return one item of an axis that the result does not have (an expert of a stack), its elements in order."""
    regions = [region for line in lines for region in line]
    items = {region[dim] for region in regions}
    ordered = [tuple(start for start, _ in region) for region in regions]
    if len(items) == 1 and ordered == sorted(ordered):
        return [next(iter(items))]
    return None


def _line(shape: Shape, axis: int, at: int) -> tuple[Run, ...]:
    return tuple((at, at + 1) if place == axis else (0, extent) for place, extent in enumerate(shape))


def _computed(tasks: Sequence[CopyTask]) -> Entry:
    joins = sorted({task.join.name for task in tasks if task.join is not None})
    return {"from": [task.source for task in tasks], "op": "computed", "detail": {"ops": joins}}


def _name(op: TensorOp) -> str:
    return op.name if isinstance(op, Call) else type(op).__name__.lower()
