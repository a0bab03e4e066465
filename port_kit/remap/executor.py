"""Execution of copy tasks: from source tensors into the parameters and buffers of a module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from port_kit.dtypes import ITEM_SIZES, all_finite, both_floating, keeps_values, overflows
from port_kit.manifest import TensorSpec
from port_kit.regions import Region, full_region, intersection, region_index, region_numel, region_shape, relative_to
from port_kit.remap.problems import Problem
from port_kit.remap.resolve import CopyTask
from port_kit.remap.tensor_ops import Cast, apply, copy_into
from port_kit.remap.transforms import find_transform
from port_kit.targets import Target

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Executor:
    """Writes the results of copy tasks into targets.

    Args:
        targets: the targets by name.
        specs: their complete shapes, which the resolver may have inferred for opaque targets.

    Attributes:
        problems: finite values that became infinite.
    """

    def __init__(self, targets: Mapping[str, Target], specs: Mapping[str, TensorSpec]) -> None:
        self.targets = targets
        self.specs = specs
        self.problems: list[Problem] = []
        self._partial: dict[tuple[str, str], tuple[Tensor, int]] = {}

    def run(self, group: Sequence[CopyTask], tensors: Mapping[str, Tensor]) -> None:
        """Execute one task, or the tasks of one transform together, from the tensors of their sources."""
        first = group[0]
        if first.join is None:
            self.copy(first, tensors[first.source])
            return
        parts = {task.role: apply(tensors[task.source], task.ops) for task in group}
        transform = find_transform(first.join.name)
        value = transform.run(parts, dict(first.join.args), region_shape(first.region))
        self.copy(first._replace(join=None, ops=()), value)

    def copy(self, task: CopyTask, tensor: Tensor) -> None:
        """Execute one task, through the parameter's own loader if it has one."""
        target, index = self.targets[task.target], self.plain_index(task, tensor.dtype)
        if index is not None:
            target.tensor.data[index].copy_(tensor)
            return
        if target.loader is None:
            self.write(task, _view(target.tensor.data, task.region), tensor)
            return
        spec = self.specs[target.name]
        shards: Mapping[str, Region] = spec.slots or {"": full_region(spec.shape)}
        value = apply(tensor, task.ops)
        if can_overflow(task, tensor, target.tensor):
            value = value.to(target.tensor.dtype)
            self._check_finite(task, value, tensor)
        if shards.get(task.shard) == task.region:
            target.load(task.shard, value[0] if "." in task.shard else value)
            return
        for shard, region in shards.items():
            common = intersection(region, task.region)
            if common is not None:
                self._collect(target, shard, region, common, _view(value, relative_to(common, task.region)))

    def plain_index(self, task: CopyTask, dtype: torch.dtype) -> tuple[slice, ...] | None:
        """Return the index of the elements that a task fills, empty for all of them; None if it does more than copy."""
        target = self.targets[task.target]
        if target.loader is not None or task.ops or dtype != target.tensor.dtype:
            return None
        return () if task.region == full_region(tuple(target.tensor.shape)) else region_index(task.region)

    def write(self, task: CopyTask, destination: Tensor, tensor: Tensor) -> None:
        """Write the result of a task's operations into memory, and check that finite values stay finite."""
        copy_into(destination, tensor, task.ops)
        if can_overflow(task, tensor, destination):
            self._check_finite(task, destination, tensor)

    def _collect(self, target: Target, shard: str, region: Region, common: Region, value: Tensor) -> None:
        """Give a complete shard to the target's loader, once all of its parts are there."""
        import torch

        if common != region:
            key = (target.name, shard)
            empty = torch.empty(region_shape(region), dtype=value.dtype, device=value.device)
            held, count = self._partial.pop(key, (empty, 0))
            _view(held, relative_to(common, region)).copy_(value)
            if count + region_numel(common) < region_numel(region):
                self._partial[key] = (held, count + region_numel(common))
                return
            value = held
        target.load(shard, value[0] if "." in shard else value)

    def _check_finite(self, task: CopyTask, result: Tensor, source: Tensor) -> None:
        """Report a finite value that one of the task's casts, or the last one to the target's dtype, loses."""
        import torch

        clamps = any(isinstance(op, Cast) and ITEM_SIZES[op.dtype] == 1 for op in task.ops)
        if not clamps and result.dtype.itemsize > 1 and all_finite(result):
            return
        value = source
        for op in (*task.ops, None):
            after = result if op is None else op.apply(value)
            if (op is None or isinstance(op, Cast)) and after.dtype.is_floating_point and overflows(after, value):
                finite = value.double().abs().nan_to_num(posinf=0.0)
                limits = f"expected at most {torch.finfo(after.dtype).max:.6g}, found {finite.max().item():.6g}"
                message = f"{task.source} has finite values that {task.target} cannot represent: {limits}"
                problem = Problem("remap_overflow", message, task.rule.label, task.source, target=task.target)
                self.problems.append(problem)
                return
            value = after


def can_overflow(task: CopyTask, source: Tensor, destination: Tensor) -> bool:
    """Return True if a cast on the way can turn a finite value into an infinite one."""
    if source.dtype == destination.dtype and not task.ops:
        return False
    names = [str(source.dtype), *(op.dtype for op in task.ops if isinstance(op, Cast)), str(destination.dtype)]
    dtypes = [name.removeprefix("torch.") for name in names]
    steps = zip(dtypes, dtypes[1:], strict=False)
    return any(both_floating(other, other) and not keeps_values(one, other) for one, other in steps)


def _view(tensor: Tensor, region: Region) -> Tensor:
    return tensor if region == full_region(tuple(tensor.shape)) else tensor[region_index(region)]
