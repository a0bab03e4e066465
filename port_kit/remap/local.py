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
from collections import defaultdict, deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from port_kit.manifest import Manifest
from port_kit.remap.boxes import Box, intersection, volume
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
        self.copies: deque[_Copy] = deque()
        self.bytes_read = 0
        self.whole: list[str] = []
        self._known: dict[object, list[_Cut] | None] = {}

    def run(self, prefix: str) -> LocalLoad:
        from safetensors import safe_open

        by_file: dict[str, list[str]] = defaultdict(list)
        writes = self.plan.by_source()
        for name in writes:
            by_file[self.plan.source[name].file].append(name)
        joined: dict[object, list[tuple[Write, Tensor]]] = defaultdict(list)
        with ExitStack() as stack:
            for file, names in by_file.items():
                opened = stack.enter_context(safe_open(self.root / file, framework="pt"))
                for name in names:
                    self._source(opened, name, writes[name], joined)
            self._copy_all()
        for group in joined.values():
            self.loader._finish_group(group)
        raise_problems(self.loader._problems, f"{self.plan.rules.name} does not load {self.root} completely")
        loaded = {prefix + name for name in self.plan.target}
        return LocalLoad(loaded, self.bytes_read, self.plan.source.nbytes, tuple(self.whole))

    def _source(self, opened: Any, name: str, writes: list[Write], joined: dict[object, Any]) -> None:
        cuts = [self._cuts(write) for write in writes]
        known = [cut for cut in cuts if cut is not None]
        if len(known) == len(cuts):
            for write, parts in zip(writes, known, strict=True):
                self._read_parts(opened, write, parts)
            return
        tensor = opened.get_tensor(name)
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

    def _read_parts(self, opened: Any, write: Write, parts: list[_Cut]) -> None:

        target = self.loader.targets[write.target].tensor.data
        whole = opened.get_tensor(write.source)  # a view of the mapped file: nothing is read before it is copied
        for part in parts:
            piece = whole[tuple(slice(start, stop) for start, stop in part.source)]
            self.bytes_read += piece.nbytes
            for step in write.steps:
                if isinstance(step, Permute):
                    piece = piece.permute(step.perm)
            place = target[tuple(slice(start, stop) for start, stop in part.local)]
            self._copy(place, piece.reshape(place.shape))

    def _copy(self, place: Tensor, piece: Tensor) -> None:
        """Copy now what is small or needs torch; put the rest by for the threads."""
        import torch

        if piece.nbytes < _SMALL or not _plain(place, piece):
            with torch.no_grad():
                place.copy_(piece)
            return
        bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[piece.element_size()]
        into, values = place.view(bits).numpy(), piece.view(bits).numpy()
        rows = max(1, _PIECE * len(values) // piece.nbytes)
        for row in range(0, len(values), rows):
            self.copies.append((into[row : row + rows], values[row : row + rows]))

    def _copy_all(self) -> None:
        """Copy what was put by; a thread takes the next when it is done with one."""
        if not self.copies:
            return
        with ThreadPoolExecutor(self.threads) as pool:
            running = [pool.submit(_drain, self.copies) for _ in range(self.threads)]
        for thread in running:
            thread.result()


_SMALL = 1 << 16
"""Bytes below which handing a copy to a thread costs more than the copy."""

_PIECE = 1 << 23
"""Bytes that a thread copies at once: small enough that a single huge tensor is shared too."""

_Copy = tuple["NDArray[Any]", "NDArray[Any]"]
"""Where to, and what: two arrays of integers of equal shape, the bits of the values."""


def _plain(place: Tensor, piece: Tensor) -> bool:
    """Whether a copy moves bits in host memory and no more: then numpy does it, without torch's own threads."""
    same = place.dtype == piece.dtype and place.is_cpu and place.dim() > 0 and piece.element_size() <= 8
    return same and place.stride(-1) == piece.stride(-1) == 1


def _drain(copies: deque[_Copy]) -> None:
    import numpy

    while True:
        try:
            place, piece = copies.popleft()
        except IndexError:
            return
        numpy.copyto(place, piece)


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
    if any("." in shard.slot for shard in target.shards) or not target.shards:
        return False
    local = [shard.local for shard in target.shards]
    same_rank = all(len(box) == target.tensor.dim() for box in local)
    return same_rank and sum(map(volume, local)) == target.tensor.numel()


def _shifted(box: Box, base: Box) -> Box:
    return tuple((a - low, b - low) for (a, b), (low, _) in zip(box, base, strict=True))
