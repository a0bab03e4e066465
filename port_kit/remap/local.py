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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from port_kit.manifest import ITEM_SIZES, Manifest
from port_kit.remap.boxes import Box, intersection, volume
from port_kit.remap.load import WeightLoader
from port_kit.remap.lower import Write
from port_kit.remap.plan import Plan, check
from port_kit.remap.problems import raise_problems
from port_kit.remap.reads import File, Part, Read, Readers, pieces
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


class _Reader:
    """One rank-local load: cuts what it can, reads the rest whole."""

    def __init__(self, plan: Plan, loader: WeightLoader, root: Path, threads: int) -> None:
        self.plan = plan
        self.loader = loader
        self.root = root
        self.threads = threads
        self.bytes_read = 0
        self.whole: list[str] = []
        self._known: dict[object, list[Part] | None] = {}

    def run(self, prefix: str) -> LocalLoad:
        by_file: dict[str, list[str]] = defaultdict(list)
        writes = self.plan.by_source()
        for name in writes:
            by_file[self.plan.source[name].file].append(name)
        joined: dict[object, list[tuple[Write, Tensor]]] = defaultdict(list)
        with Readers(self.threads) as readers:
            for file, names in by_file.items():
                opened = File(self.root / file)
                for name in names:
                    for read in self._source(opened, name, writes[name], joined):
                        readers.put(read)
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

        with torch.no_grad():
            for name in self.plan.by_target():
                target = self.loader.targets[name]
                for box in target.padding:
                    target.tensor.data[_index(box)].zero_()

    def _source(self, opened: File, name: str, writes: list[Write], joined: dict[object, Any]) -> list[Read]:
        """The reads of a source; one that cannot be cut is stored at once, or put to its group."""
        found = [self._parts(write) for write in writes]
        known = [parts for parts in found if parts is not None]
        if len(known) == len(found):
            return [
                read for write, parts in zip(writes, known, strict=True) for read in self._reads(opened, write, parts)
            ]
        tensor = opened.tensor(name)
        self.bytes_read += self.plan.source[name].nbytes
        if any(self._is_split(write) for write in writes):
            self.whole.append(name)
        for write in writes:
            if write.join is not None:
                joined[write.group].append((write, tensor))
            else:
                self.loader._store(write, tensor)
        return []

    def _parts(self, write: Write) -> list[Part] | None:
        """:func:`_parts` of a write, worked out once for all layers."""
        target = self.loader.targets[write.target]
        key = (id(write.steps), id(write.region), id(write.join), id(target.shards))  # the plan keeps them alive
        if key not in self._known:
            self._known[key] = _parts(write, target)
        return self._known[key]

    def _is_split(self, write: Write) -> bool:
        return self.loader.targets[write.target].tensor.numel() < self.plan.target[write.target].numel

    def _reads(self, opened: File, write: Write, parts: list[Part]) -> list[Read]:
        spec = self.plan.source[write.source]
        size = ITEM_SIZES[spec.dtype]
        self.bytes_read += size * sum(part.numel for part in parts)
        tensor = self.loader.targets[write.target].tensor.data
        if not _is_plain(tensor, self.plan.target[write.target].dtype, spec.dtype):
            self._copy(opened.tensor(write.source), tensor, parts)
            return []
        found: list[Read] = []
        for part in parts:
            found += pieces(opened, write.source, part, part.numel * size, partial(_bits, tensor))
        return found

    def _copy(self, source: Tensor, target: Tensor, parts: list[Part]) -> None:
        """Convert parts of a mapped source, or send them to a device."""
        import torch

        for part in parts:
            into, piece = target[part.local], source[part.source]
            for perm in part.perms:
                piece = piece.permute(perm)
            with torch.no_grad():
                into.copy_(piece.reshape(into.shape))


def _is_plain(tensor: Tensor, dtype: str, source: str) -> bool:
    """Whether a tensor takes a source's very bits, and has them in host memory."""
    import torch

    return dtype == source and type(tensor) is torch.Tensor and tensor.is_cpu and 0 < tensor.element_size() <= 8


def _bits(tensor: Tensor) -> Tensor:
    """A tensor as integers; by way of numpy, so that its copy is written whether or not it knows inference mode."""
    import torch

    return torch.from_numpy(tensor.view(getattr(torch, f"int{8 * tensor.element_size()}")).numpy())


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
        found.append(Part.of(boxes[0], local, perms))
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
