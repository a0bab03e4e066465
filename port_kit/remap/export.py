"""The way back: the original tensors from a loaded module or a converted checkpoint, by the same plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from port_kit.errors import RemapError
from port_kit.manifest import Manifest
from port_kit.remap.boxes import volume, whole
from port_kit.remap.lower import Write
from port_kit.remap.plan import Plan
from port_kit.remap.steps import Call, back, copy_through, gather, scatter
from port_kit.remap.transforms import find_transform

if TYPE_CHECKING:
    from torch import Tensor, nn

Read = Callable[[str], "Tensor"]


def export(plan: Plan, read: Read | Mapping[str, Tensor] | nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Give back the sources of a plan, one by one.

    Values come back bit for bit, except where a source's dtype is narrower than what it was rounded to on loading, and
    where a transform says that its inverse is not exact. Sources that were dropped as a whole are left out.

    Args:
        plan: the plan of the load.
        read: the target tensors: a module, a mapping, or a function that returns one by name.

    Yields:
        ``(source name, tensor)`` in the order of the source manifest.

    Raises:
        RemapError: ``remap_op`` for a transform without an inverse; ``remap_unused`` for a source of which a part was
            dropped, so that it cannot be made whole.
    """
    tensor_of = _reader(read)
    joined = _joins(plan)
    for name, writes in plan.by_source().items():
        yield name, _source(plan, name, writes, tensor_of, joined)


def _reader(read: Read | Mapping[str, Tensor] | nn.Module) -> Read:
    if hasattr(read, "named_parameters"):
        from port_kit.remap.targets import read_targets

        targets = read_targets(read).targets  # type: ignore[arg-type]  # a module has named_parameters
        return lambda name: targets[name].tensor.data
    if isinstance(read, Mapping):
        return read.__getitem__
    return read  # type: ignore[return-value]  # what is left is the function


def _joins(plan: Plan) -> dict[object, list[Write]]:
    groups: dict[object, list[Write]] = defaultdict(list)
    for write in plan.writes:
        if write.join is not None:
            groups[write.group].append(write)
    return groups


def _source(plan: Plan, name: str, writes: list[Write], read: Read, joined: Mapping[object, list[Write]]) -> Tensor:
    import torch

    spec = plan.source[name]
    used = sum(_used(write) for write in writes)
    if used != spec.numel:
        raise RemapError(
            f"{name} cannot be made whole: {spec.numel - used} of its elements were dropped on loading",
            code="remap_unused",
            hint="export needs rules that use all of a source",
        )
    result = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
    for write in writes:
        value = read(write.target)[tuple(slice(start, stop) for start, stop in write.region)]
        if write.join is not None:
            value = _part(write, joined[write.group], value)
        with torch.no_grad():
            scatter(result, write.steps, value.reshape(write.shape))
    return result


def _used(write: Write) -> int:
    return sum(map(volume, back(write.steps, [whole(write.shape)])))


def _part(write: Write, group: Iterable[Write], value: Tensor) -> Tensor:
    assert write.join is not None
    shapes = {other.part: other.shape for other in group}
    return find_transform(write.join.name).undo(value, dict(write.join.args), shapes)[write.part]


def inexact(plan: Plan) -> dict[str, str]:
    """Sources that do not come back bit for bit, with the reason."""
    from port_kit.checkpoint.dtypes import keeps_values

    found: dict[str, str] = {}
    for write in plan.writes:
        spec, target = plan.source[write.source], plan.target[write.target]
        names = [step.name for step in write.steps if isinstance(step, Call)]
        names += [write.join.name] if write.join is not None else []
        for name in names:
            if not find_transform(name).exact:
                found[write.source] = f"transform {name} has no exact inverse"
        if not keeps_values(spec.dtype, target.dtype):
            found[write.source] = f"{spec.dtype} was rounded to {target.dtype}"
    return found


def export_file(plan: Plan, read: Read | Mapping[str, Tensor] | nn.Module, path: str | Path) -> Path:
    """Write the sources of a plan into one safetensors file.

    Raises:
        RemapError: as :func:`export`.
    """
    return _save(dict(export(plan, read)), Path(path))


def _save(tensors: Mapping[str, Tensor], path: Path) -> Path:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata={"format": "pt"})
    partial.replace(path)
    return path


def checkpoint_reader(folder: str | Path, manifest: Manifest) -> Read:
    """A function that reads tensors of a safetensors checkpoint by name, one at a time."""
    from safetensors import safe_open

    root = Path(folder)
    root = root if root.is_dir() else root.parent
    opened: dict[str, Any] = {}

    def read(name: str) -> Tensor:
        file = manifest[name].file
        if file not in opened:
            opened[file] = safe_open(root / file, framework="pt").__enter__()
        return opened[file].get_tensor(name)

    return read


def convert(plan: Plan, read: Read | Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The way there without a module: the target tensors of a plan, one by one, in the target's dtypes.

    Yields:
        ``(target name, tensor)``; kept targets are left out, because no source has them.
    """
    import torch

    tensor_of = _reader(read)
    for name, writes in plan.by_target().items():
        spec = plan.target[name]
        result = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
        groups: dict[object, list[Write]] = defaultdict(list)
        for write in writes:
            groups[write.group if write.join is not None else write].append(write)
        for group in groups.values():
            part = result[tuple(slice(start, stop) for start, stop in group[0].region)]
            with torch.no_grad():
                _fill(part, group, tensor_of)
        yield name, result


def _fill(part: Tensor, group: list[Write], read: Read) -> None:
    first = group[0]
    if first.join is None:
        copy_through(part, read(first.source), first.steps)
        return
    parts = {write.part: gather(read(write.source), write.steps) for write in group}
    part.copy_(find_transform(first.join.name).run(parts, dict(first.join.args), tuple(part.shape)))


def convert_file(plan: Plan, read: Read | Mapping[str, Tensor], path: str | Path) -> Path:
    """Write the targets of a plan into one safetensors file."""
    return _save(dict(convert(plan, read)), Path(path))
