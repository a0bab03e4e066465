"""Rank-local loading: read from safetensors only the rows and columns that this rank holds.

The plan is compiled from headers; the part of each source that this rank needs follows from the plan's own books
(:func:`port_kit.remap.steps.back`). Where a part cannot be cut out beforehand (a transposed reshape, a transform, a
parameter that only its own loader understands), the tensor is read whole and goes the way of
:func:`port_kit.remap.load.load_weights`.

All parts are known before the first is read, so a few threads share them: :mod:`port_kit.remap.reads`.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from port_kit.checkpoint.dtypes import ITEM_SIZES
from port_kit.manifest import Manifest, TensorSpec
from port_kit.remap.boxes import Box, intersection, volume
from port_kit.remap.load import WeightLoader
from port_kit.remap.lower import Write
from port_kit.remap.plan import Plan, check
from port_kit.remap.problems import raise_problems
from port_kit.remap.reads import Cut, File, Part, Read, Readers, cuts
from port_kit.remap.rules import RuleSet
from port_kit.remap.steps import Call, Cast, Permute, Reshape, Step, Take, back
from port_kit.remap.targets import Target

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class LocalLoad:
    """What a rank-local load did.

    Attributes:
        loaded: names of the loaded targets, with the prefix in front.
        bytes_read: bytes of tensors that were read.
        bytes_whole: bytes of the checkpoint's tensors.
        read_whole: sources that had to be read whole although this rank holds a part.
    """

    loaded: set[str]
    bytes_read: int
    bytes_whole: int
    read_whole: tuple[str, ...]


def load_local(
    module: nn.Module,
    folder: str | Path,
    rules: RuleSet,
    *,
    sizes: Mapping[str, int] | None = None,
    prefix: str = "",
    narrow: bool = True,
    threads: int | None = None,
) -> LocalLoad:
    """Fill this rank's module from a safetensors folder, reading no more than the rank holds.

    Args:
        module: as in :func:`port_kit.remap.load.load_weights`; its sharded parameters tell what this rank holds.
        folder: a safetensors file, folder or index.
        rules: the rule set.
        sizes: named sizes on top of the rule set's own.
        prefix: what stands before the returned names.
        narrow: floating-point values may be rounded to the module's dtype.
        threads: how many threads read, at least 1; by default as many as this process has cores, at most 4.

    Raises:
        RemapError: every gap, before the first tensor is read.
        ValueError: fewer threads than one.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads}: at least one thread has to read")
    source = Manifest.from_safetensors(folder)
    loader = WeightLoader(module, rules, sizes=sizes, prefix=prefix, narrow=narrow)
    plan = check(
        rules, source, loader.manifest, sizes, narrow=narrow, elastic=loader.lowering.elastic, lowering=loader.lowering
    )
    raise_problems(plan.explained(), f"{rules.name} does not map {folder} completely")
    root = Path(folder) if Path(folder).is_dir() else Path(folder).parent
    return _Reader(plan, loader, root, threads or min(4, len(os.sched_getaffinity(0)))).run(prefix)


@dataclass(frozen=True)
class _Way:
    """How a write's parts come to this rank's tensor.

    Attributes:
        parts: all that this rank needs of the write.
        nbytes: bytes of them.
        cuts: them as bits that go straight from memory to memory; None where they have to be converted or sent on.
    """

    parts: list[Part]
    nbytes: int
    cuts: list[Cut] | None


class _Reader:
    """One rank-local load: cuts what it can, reads the rest whole."""

    def __init__(self, plan: Plan, loader: WeightLoader, root: Path, threads: int) -> None:
        self.plan = plan
        self.loader = loader
        self.root = root
        self.threads = threads
        self.bytes_read = 0
        self.whole: list[str] = []
        self._ways: dict[object, _Way | None] = {}

    def run(self, prefix: str) -> LocalLoad:
        by_file: dict[str, list[str]] = defaultdict(list)
        writes = self.plan.by_source()
        for name in writes:
            by_file[self.plan.source[name].file].append(name)
        joined: dict[object, list[tuple[Write, Tensor]]] = defaultdict(list)
        with Readers(self.threads) as readers:
            for file, names in by_file.items():
                opened = File(self.root, file, self.plan.source)
                for name in names:
                    self._source(opened, name, writes[name], readers, joined)
            readers.finish()
        for group in joined.values():
            self.loader._finish_group(group)
        self._clear_padding()
        raise_problems(self.loader._problems, f"{self.plan.rules.name} does not load {self.root} completely")
        loaded = {prefix + name for name in self.plan.target}
        return LocalLoad(loaded, self.bytes_read, self.plan.source.nbytes, tuple(self.whole))

    def _clear_padding(self) -> None:
        """Set to zero what pads this rank's part, as the parameter's own loader does."""
        import torch

        padded = [target for target in self.loader.targets.values() if target.padding]
        written = {write.target for write in self.plan.writes} if padded else set()
        with torch.no_grad():
            for target in padded:
                for box in target.padding if target.name in written else ():
                    target.tensor.data[_index(box)].zero_()

    def _source(
        self, opened: File, name: str, writes: list[Write], readers: Readers, joined: dict[object, Any]
    ) -> None:
        """Have a source read; one that cannot be cut is stored at once, or put to its group."""
        spec = self.plan.source[name]
        targets = [self.loader.targets[write.target] for write in writes]
        ways = [self._way(write, target, spec) for write, target in zip(writes, targets, strict=True)]
        known = [way for way in ways if way is not None]
        if len(known) == len(writes):
            for target, way in zip(targets, known, strict=True):
                self.bytes_read += way.nbytes
                tensor = target.tensor.data
                if way.cuts is None:
                    _copy(opened.tensor(name), tensor, way.parts)
                else:
                    readers.put(Read(opened, name, tensor, way.cuts))
            return
        whole = opened.tensor(name)
        self.bytes_read += spec.nbytes
        if any(self._is_split(write) for write in writes):
            self.whole.append(name)
        for write in writes:
            if write.join is not None:
                joined[write.group].append((write, whole))
            else:
                self.loader._store(write, whole)

    def _way(self, write: Write, target: Target, spec: TensorSpec) -> _Way | None:
        """The way of a write, worked out once for all layers; None where it cannot be cut out of the source."""
        tensor = target.tensor
        ids = (id(write.steps), id(write.region), id(write.join), id(target.shards))  # the plan keeps them alive
        dtypes = (spec.dtype, target.spec.dtype)
        key = (*ids, *dtypes, spec.shape, tensor.shape, tensor.stride(), type(tensor), tensor.is_cpu)
        if key not in self._ways:
            parts = _parts(write, target)
            self._ways[key] = None if parts is None else _way(parts, target, spec)
        return self._ways[key]

    def _is_split(self, write: Write) -> bool:
        return self.loader.targets[write.target].tensor.numel() < self.plan.target[write.target].numel


def _copy(source: Tensor, target: Tensor, parts: list[Part]) -> None:
    """Convert parts of a mapped source, or send them to a device."""
    import torch

    for part in parts:
        into, piece = target[_index(part.local)], source[_index(part.source)]
        for perm in part.perms:
            piece = piece.permute(perm)
        with torch.no_grad():
            into.copy_(piece.reshape(into.shape))


def _way(parts: list[Part], target: Target, spec: TensorSpec) -> _Way:
    """The way of parts, as cuts where the tensor takes the source's very bits and has them in host memory."""
    import torch

    size, tensor = ITEM_SIZES[spec.dtype], target.tensor.data
    plain = type(tensor) is torch.Tensor and tensor.is_cpu and size == tensor.element_size() <= 8
    alike = plain and target.spec.dtype == spec.dtype
    found = [cut for part in parts for cut in cuts(part, spec.shape, tensor.stride(), size)] if alike else None
    return _Way(parts, size * sum(part.numel for part in parts), found)


def _parts(write: Write, target: Target) -> list[Part] | None:
    """What this rank needs of a write; None where it cannot be cut out of the source."""
    if write.join is not None or not _cuttable(write.steps) or not _held_whole(target):
        return None
    perms = tuple(step.perm for step in write.steps if isinstance(step, Permute))
    found: list[Part] = []
    for shard in target.shards:
        wanted = intersection(write.region, shard.held)
        if wanted is None:
            continue
        inner = _shifted(wanted, write.region)
        boxes = back(write.steps, [inner])
        if len(boxes) != 1:
            return None
        offset = _shifted(wanted, shard.held)
        local = tuple((a + low, b + low) for (a, b), (low, _) in zip(offset, shard.local, strict=True))
        found.append(Part(boxes[0], local, perms))
    return found


def _cuttable(steps: tuple[Step, ...]) -> bool:
    """Whether a box of the result is a box of the source with its elements in the same order, axes apart."""
    permutes = any(isinstance(step, Permute) for step in steps)
    reshapes = any(isinstance(step, Reshape) for step in steps)
    known = all(isinstance(step, (Take, Permute, Reshape, Cast)) for step in steps)
    return known and not (permutes and reshapes) and not any(isinstance(step, (Call, Cast)) for step in steps)


def _held_whole(target: Target) -> bool:
    """Whether the shards tell about every element of this rank's tensor."""
    if not target.shards:
        return False
    local = [*[shard.local for shard in target.shards], *target.padding]
    same_rank = all(len(box) == target.tensor.dim() for box in local)
    return same_rank and sum(map(volume, local)) == target.tensor.numel()


def _index(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)


def _shifted(box: Box, base: Box) -> Box:
    return tuple((a - low, b - low) for (a, b), (low, _) in zip(box, base, strict=True))
