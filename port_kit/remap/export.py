"""Conversion by a plan without a module, and the inverse: from targets to the original tensors.

Files record in their metadata which names they have, so that no loader has to guess.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from port_kit.dtypes import keeps_values, overflows
from port_kit.manifest import NAMING_KEY, Manifest
from port_kit.regions import full_region, region_index, region_numel
from port_kit.remap.executor import Executor
from port_kit.remap.ops import Op
from port_kit.remap.plan import Plan, grouped
from port_kit.remap.problems import raise_problems, remap_error
from port_kit.remap.resolve import CopyTask
from port_kit.remap.tensor_ops import Call, apply, apply_inverse, source_region
from port_kit.remap.transforms import find_transform
from port_kit.targets import Target, read_targets

if TYPE_CHECKING:
    from torch import Tensor, nn

Read = Callable[[str], "Tensor"]


def convert(plan: Plan, read: Read | Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the target tensors of a plan, one by one, in the target's dtypes.

    Yields:
        ``(target name, tensor)``; kept targets are left out, because no source has them.

    Raises:
        RemapError: ``remap_overflow`` for a finite value that the target's dtype cannot represent.
    """
    import torch

    tensor_of = _reader(read)
    for name, tasks in plan.by_target().items():
        spec = plan.target[name]
        result = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
        executor = Executor({name: Target(name, result, spec, (), None)}, {name: spec})
        with torch.no_grad():
            for group in grouped(tasks, lambda task: task.group if task.join is not None else task).values():
                executor.run(group, {task.source: tensor_of(task.source) for task in group})
        raise_problems(executor.problems, f"{plan.rules.name} does not convert {name}")
        yield name, result


def export(plan: Plan, read: Read | Mapping[str, Tensor] | nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the source tensors of a plan, one by one, from its targets.

    Values are restored bit for bit, unless the source's dtype was rounded on loading or a transform has no exact
    inverse (see :func:`inexact`). Sources that were dropped completely are left out.

    Args:
        plan: the plan of the load.
        read: the target tensors: a module, a mapping, or a function that returns one by name.

    Yields:
        ``(source name, tensor)`` in the order of the source manifest.

    Raises:
        RemapError: ``remap_op`` for a transform without an inverse, or for a source whose copies in several targets
            differ; ``remap_mixed`` for targets that record original names; ``remap_unused`` for a source of which a
            part was dropped; ``remap_overflow``.
    """
    if plan.target.naming == "original":
        message = f"{plan.target.origin or 'the checkpoint'} records original names: expected those of the module"
        raise remap_error("remap_mixed", message, "export the converted checkpoint, or convert this one (--forward)")
    tensor_of = _reader(read)
    for name, tasks in plan.by_source().items():
        copies = grouped(tasks, lambda task: "" if task.rule.take else task.rule)  # with take: parts of one copy
        complete = [copy for copy in copies.values() if _used(copy) == plan.source[name].numel] or list(copies.values())
        complete = [copy for copy in complete if _keeps_values(plan, copy)] or complete
        restored = [_restore(plan, name, copy, tensor_of) for copy in complete]
        parts = [task for copy in copies.values() if copy not in complete for task in copy]
        agree = all(_same_bits(other, restored[0]) for other in restored[1:])
        if not agree or not all(_agrees(task, restored[0], tensor_of(task.target)) for task in parts):
            copies_of = ", ".join(task.target for task in tasks)
            hint = "export with rules that read it from one of them"
            raise remap_error("remap_op", f"{name} cannot be restored: its copies in {copies_of} differ", hint)
        yield name, restored[0]


def _restore(plan: Plan, name: str, tasks: Sequence[CopyTask], read: Read) -> Tensor:
    import torch

    spec = plan.source[name]
    used = _used(tasks)
    if used != spec.numel:
        message = f"{name} cannot be restored: {spec.numel - used} of its elements were dropped on loading"
        raise remap_error("remap_unused", message, "export needs rules that use all of a source")
    result, joined = torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)), plan.joined()
    for task in tasks:
        value = read(task.target)[region_index(task.region)]
        if task.join is not None:
            shapes = {other.role: other.shape for other in joined[task.group]}
            value = find_transform(task.join.name).undo(value, dict(task.join.args), shapes)[task.role]
        rounded = value.to(result.dtype)
        with torch.no_grad():
            apply_inverse(result, task.ops, rounded.reshape(task.shape))
        if rounded.dtype != value.dtype and overflows(rounded, value):
            message = f"{name} cannot be restored: {task.target} has finite values that {spec.dtype} cannot represent"
            raise remap_error("remap_overflow", message, "export into a wider dtype")
    return result


def _used(tasks: Sequence[CopyTask]) -> int:
    return sum(region_numel(part) for task in tasks for part in source_region(task.ops, [full_region(task.shape)]))


def _keeps_values(plan: Plan, tasks: Sequence[CopyTask]) -> bool:
    return all(keeps_values(plan.source[task.source].dtype, plan.target[task.target].dtype) for task in tasks)


def _agrees(task: CopyTask, source: Tensor, target: Tensor) -> bool:
    """Return True if a task would write the target's value."""
    if task.join is not None:
        return True
    value = target[region_index(task.region)]
    return _same_bits(apply(source, task.ops).to(value.dtype), value.reshape(task.shape))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    import torch

    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def inexact(plan: Plan) -> dict[str, str]:
    """Return the sources that are not restored bit for bit, with the reason."""
    found: dict[str, str] = {}
    for task in plan.tasks:
        spec, target = plan.source[task.source], plan.target[task.target]
        for op in (*task.ops, task.join):
            if isinstance(op, (Call, Op)) and not find_transform(op.name).exact:
                found[task.source] = f"transform {op.name} has no exact inverse"
        if not keeps_values(spec.dtype, target.dtype):
            found[task.source] = f"{spec.dtype} was rounded to {target.dtype}"
    return found


def convert_file(plan: Plan, read: Read | Mapping[str, Tensor], path: str | Path) -> Path:
    """Write the targets of a plan into one safetensors file; raises as :func:`convert`."""
    return _save(dict(convert(plan, read)), Path(path), f"converted:{plan.rules.name}")


def export_file(plan: Plan, read: Read | Mapping[str, Tensor] | nn.Module, path: str | Path) -> Path:
    """Write the sources of a plan into one safetensors file; raises as :func:`export`."""
    return _save(dict(export(plan, read)), Path(path), "original")


def _save(tensors: Mapping[str, Tensor], path: Path, naming: str) -> Path:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, partial, metadata={"format": "pt", NAMING_KEY: naming})
    partial.replace(path)
    return path


def _reader(read: Read | Mapping[str, Tensor] | nn.Module) -> Read:
    if hasattr(read, "named_parameters"):
        targets = read_targets(read).targets  # type: ignore[arg-type]  # a module has named_parameters
        return lambda name: targets[name].tensor.data
    if isinstance(read, Mapping):
        return read.__getitem__
    return read  # type: ignore[return-value]  # only the function is left


def checkpoint_reader(folder: str | Path, manifest: Manifest) -> Read:
    """Return a function that reads tensors of a safetensors checkpoint by name, one at a time."""
    from safetensors import safe_open

    root = Path(folder) if Path(folder).is_dir() else Path(folder).parent

    @cache
    def opened(file: str) -> Any:
        return safe_open(root / file, framework="pt").__enter__()

    return lambda name: opened(manifest[name].file).get_tensor(name)
