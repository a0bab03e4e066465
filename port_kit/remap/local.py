"""Rank-local loading: read from safetensors only the rows and columns that this rank holds.

The plan is compiled from headers; the part of each source that this rank needs follows from the plan's own books
(:func:`port_kit.remap.steps.back`). Where a part cannot be cut out beforehand (a transposed reshape, a transform, a
parameter that only its own loader understands), the tensor is read whole and goes the way of
:func:`port_kit.remap.load.load_weights`.

Every part is a view of the mapped file and is copied once, into its place in the parameter. Since all parts are known
before the first is copied, a few threads share them: a column slice touches every page of its tensor, so that one
thread would spend more time on page faults and short rows than the bytes saved are worth.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from port_kit.manifest import ITEM_SIZES, SAFETENSORS_DTYPES, Manifest, read_header
from port_kit.remap.boxes import Box, intersection, volume
from port_kit.remap.copies import Copies
from port_kit.remap.load import WeightLoader
from port_kit.remap.lower import Write
from port_kit.remap.plan import Plan, check
from port_kit.remap.problems import raise_problems
from port_kit.remap.rules import RuleSet
from port_kit.remap.steps import Call, Cast, Permute, Reshape, Step, Take, back
from port_kit.remap.targets import Target

if TYPE_CHECKING:
    from numpy.typing import NDArray
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
        threads: how many threads copy, at least 1; by default as many as this process has cores, at most 4.

    Raises:
        RemapError: every gap, before the first tensor is read.
        ValueError: fewer threads than one.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads}: at least one thread has to copy")
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
        self._known: dict[object, list[_Cut] | None] = {}

    def run(self, prefix: str) -> LocalLoad:
        by_file: dict[str, list[str]] = defaultdict(list)
        writes = self.plan.by_source()
        for name in writes:
            by_file[self.plan.source[name].file].append(name)
        joined: dict[object, list[tuple[Write, Tensor]]] = defaultdict(list)
        with Copies(self.threads) as self.copies:
            for file, names in by_file.items():
                opened = _File(self.root / file)
                for name in names:
                    self._source(opened, name, writes[name], joined)
            self.copies.run()
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

    def _source(self, opened: _File, name: str, writes: list[Write], joined: dict[object, Any]) -> None:
        cuts = [self._cuts(write) for write in writes]
        known = [cut for cut in cuts if cut is not None]
        if len(known) == len(cuts):
            for write, parts in zip(writes, known, strict=True):
                self._read_parts(opened, write, parts)
            return
        tensor = opened.tensor(name)
        self.bytes_read += self.plan.source[name].nbytes
        if any(self._is_split(write) for write in writes):
            self.whole.append(name)
        for write in writes:
            if write.join is not None:
                joined[write.group].append((write, tensor))
            else:
                self.loader._store(write, tensor)

    def _cuts(self, write: Write) -> list[_Cut] | None:
        """:func:`_cuts` of a write, worked out once for all layers."""
        target = self.loader.targets[write.target]
        key = (write.steps, write.region, write.join, target.shards)
        if key not in self._known:
            self._known[key] = _cuts(write, target)
        return self._known[key]

    def _is_split(self, write: Write) -> bool:
        return self.loader.targets[write.target].tensor.numel() < self.plan.target[write.target].numel

    def _read_parts(self, opened: _File, write: Write, parts: list[_Cut]) -> None:
        import torch

        place = self._bits(write.target, self.plan.source[write.source].dtype)
        source: Any = opened.tensor(write.source) if place is None else opened.bits(write.source)
        target: Any = self.loader.targets[write.target].tensor.data if place is None else place
        permutes = [step.perm for step in write.steps if isinstance(step, Permute)]
        for part in parts:  # both are views: nothing is read before it is copied
            into, piece = target[_index(part.local)], source[_index(part.source)]
            self.bytes_read += piece.nbytes
            for perm in permutes:
                piece = piece.permute(perm) if place is None else piece.transpose(perm)
            piece = piece.reshape(into.shape)
            if place is None:
                with torch.no_grad():
                    into.copy_(piece)
            else:
                self.copies.put_by(into, piece)

    def _bits(self, name: str, dtype: str) -> NDArray[Any] | None:
        """A target as an array of integers; None where a copy must convert or leave host memory."""
        import torch

        tensor = self.loader.targets[name].tensor.data
        spec = self.plan.target[name]
        if spec.dtype != dtype or type(tensor) is not torch.Tensor or not tensor.is_cpu or not tensor.dim():
            return None
        if tensor.element_size() > 8:
            return None
        return tensor.view(getattr(torch, f"int{8 * tensor.element_size()}")).numpy()


class _File:
    """A safetensors file whose tensors are views of its mapping, as bits or as tensors."""

    def __init__(self, path: Path) -> None:
        import numpy

        self.path = path
        self._header, self._start = read_header(path)
        self._bytes = numpy.memmap(path, numpy.uint8, "r")
        self._opened: Any = None

    def bits(self, name: str) -> NDArray[Any]:
        """A tensor as an array of integers of its elements' size."""
        import numpy

        entry = self._header[name]
        size = ITEM_SIZES[SAFETENSORS_DTYPES[entry["dtype"]]]
        start = self._start + entry["data_offsets"][0]
        return numpy.ndarray(entry["shape"], f"i{size}", self._bytes, start)

    def tensor(self, name: str) -> Tensor:
        """A tensor of its own dtype."""
        from safetensors import safe_open

        if self._opened is None:
            self._opened = safe_open(self.path, framework="pt")
        return self._opened.get_tensor(name)


@dataclass(frozen=True)
class _Cut:
    """A box of a source, and the box of this rank's tensor that it fills."""

    source: Box
    local: Box


def _cuts(write: Write, target: Target) -> list[_Cut] | None:
    """What this rank needs of a write; None where it cannot be cut out of the source."""
    if write.join is not None or not _cuttable(write.steps) or not _held_whole(target):
        return None
    found: list[_Cut] = []
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
        found.append(_Cut(boxes[0], local))
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
