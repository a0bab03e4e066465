"""Loading from safetensors files: each rank reads only the bytes that its copy tasks need, ahead of their use.

A plan says which region of which source each rank needs. A few threads read these regions, straight into a target in
host memory, or into page-locked memory from which a GPU copies, at most :data:`WINDOW` bytes ahead. A source that can
not be cut (a transform, a transposition of a reshaped tensor, a parameter that only its own loader understands) is read
completely and executed as in :mod:`port_kit.remap.load`.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from port_kit.checkpoint.safetensors_file import BLOCK, SafetensorsFile
from port_kit.dtypes import ITEM_SIZES
from port_kit.manifest import Manifest
from port_kit.regions import Region, Shape, intersection, region_index, region_shape, relative_to, shifted, with_span
from port_kit.remap.executor import Executor
from port_kit.remap.load import target_manifest
from port_kit.remap.plan import Plan, check
from port_kit.remap.problems import raise_problems
from port_kit.remap.resolve import CopyTask, Resolver
from port_kit.remap.rule import Rules, Sizes
from port_kit.remap.tensor_ops import Call, Cast, Permute, Reshape, TensorOp, source_region
from port_kit.targets import Target, read_targets
from port_kit.upstream.checks import require

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

#: Bytes in buffers that are being read or wait to be copied; one larger tensor is read alone.
WINDOW = 256 << 20
#: Threads if the target is on a GPU: the calling one copies, and the others wait for the disk more than they copy.
GPU_THREADS = 9


@dataclass(frozen=True)
class LocalLoad:
    """Result of a load from files.

    Attributes:
        loaded: names of the loaded targets, with the prefix.
        bytes_read, bytes_whole: bytes of tensors that were read, and of all tensors in the checkpoint.
        read_whole: sources that were read completely although this rank holds a part.
    """

    loaded: set[str]
    bytes_read: int
    bytes_whole: int
    read_whole: tuple[str, ...]


def load_local(
    module: nn.Module,
    folder: str | Path,
    rules: Rules,
    *,
    sizes: Sizes | None = None,
    prefix: str = "",
    allow_downcast: bool = True,
    threads: int | None = None,
) -> LocalLoad:
    """Fill this rank's module from safetensors files.

    Args:
        module, rules, sizes, prefix, allow_downcast: as for :func:`port_kit.remap.load.load_weights`; the module's
            sharded parameters define this rank's part.
        folder: a safetensors file, folder or index.
        threads: number of reading threads, at least 1; by default one per core, at most 4, or 8 for a GPU.

    Raises:
        RemapError: every gap, before the first tensor is read; ``checkpoint_corrupt`` or ``checkpoint_unreadable`` for
            a file that cannot be read to its end.
        ValueError: fewer threads than one.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads}: at least 1 is required")
    import torch

    source, found = Manifest.from_safetensors(folder), read_targets(module)
    target = target_manifest(module, found)
    resolver = Resolver(rules, target, sizes or {}, allow_downcast=allow_downcast, opaque=found.opaque)
    plan = check(rules, source, target, resolver=resolver)
    raise_problems(plan.explained(), f"{rules.name} does not map {folder} completely")
    executor = Executor(found.targets, resolver.target)
    root = Path(folder) if Path(folder).is_dir() else Path(folder).parent
    if threads is None:
        on_gpu = any(each.memory.is_cuda for each in found.targets.values())
        threads = GPU_THREADS if on_gpu else min(4, len(os.sched_getaffinity(0)))
    load = _Load(plan, executor, root)
    torch_threads = torch.get_num_threads()
    try:
        with torch.inference_mode():  # tensors that were created in it may be written only in it
            load.run(threads)
    finally:
        torch.set_num_threads(torch_threads)
    raise_problems(executor.problems, f"{rules.name} does not load {folder} completely")
    return LocalLoad({prefix + name for name in plan.target}, load.bytes_read, source.nbytes, tuple(load.read_whole))


class Transfer(NamedTuple):
    """A region of a source that fills a region of this rank's memory, the same in all layers that are alike.

    Attributes:
        source: the region of the source.
        shape: its extents.
        local: the region of this rank's memory, empty for all of it.
        permutations: the permutations of axes between them.
    """

    source: Region
    shape: Shape
    local: tuple[slice, ...]
    permutations: tuple[tuple[int, ...], ...]


class _Staged(NamedTuple):
    """A region that is read into page-locked memory: its batch of reads and the start of its copy to the GPU."""

    batch: _Batch
    copy: Callable[[], None]


class _Batch:
    """Reads and copies that one thread executes after each other."""

    def __init__(self) -> None:
        self.reads: list[Callable[[], object]] = []
        self.spans: dict[SafetensorsFile, tuple[int, int]] = {}
        self.memory: list[Tensor] = []
        self.pieces: list[Tensor] = []
        self.nbytes = 0
        self.result: Future[None] | None = None

    def run(self) -> None:
        """Execute them; the copies in one call, because after each call a thread has to wait for the interpreter."""
        import torch

        with torch.inference_mode():  # it is a property of the thread
            for read in self.reads:
                read()
            for file in self.spans:
                file.check_size()
            if self.memory:
                require("copy_of_lists")
                torch._foreach_copy_(self.memory, self.pieces)
            for file, span in self.spans.items():
                file.unmap(*span)

    def add_copy(self, file: SafetensorsFile, span: tuple[int, int], memory: Tensor, piece: Tensor) -> None:
        """Add a copy out of a span of a mapped file; spans come in the order of the file."""
        self.spans[file] = (self.spans.get(file, span)[0], span[1])
        self.memory.append(memory)
        self.pieces.append(piece)

    @property
    def done(self) -> bool:
        """Return True if all reads have ended."""
        return self.result is not None and self.result.done()

    def wait(self) -> None:
        """Wait for the end of all reads, and raise their first error."""
        if self.result is not None and not self.result.cancelled():
            self.result.result()

    def steal(self) -> None:
        """Execute the batch in this thread, if no other has begun with it."""
        if self.result is not None and self.result.cancel():
            self.run()


class Ring:
    """Spans of a memory of fixed size, which are taken and given back in the same order."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._spans: deque[tuple[int, int]] = deque()

    def take(self, size: int) -> int | None:
        """Return the start of a free span, aligned to 64 bytes, or None until older ones are given back."""
        first, last = (self._spans[0][0], self._spans[-1]) if self._spans else (0, (0, 0))
        start = -(-last[1] // 64) * 64
        limit = self._size if last[0] >= first else first - 1
        if start + size > limit and last[0] >= first:
            start, limit = 0, first - 1 if self._spans else self._size
        if start + size > limit:
            return None
        self._spans.append((start, start + size))
        return start

    def give_back(self) -> None:
        """Free the oldest span."""
        self._spans.popleft()


class _Load:
    """One load: selects byte ranges, reads ahead, and executes."""

    def __init__(self, plan: Plan, executor: Executor, root: Path) -> None:
        self.plan, self.executor, self.root = plan, executor, root
        self.bytes_read = 0
        self.read_whole: list[str] = []
        self._joined = plan.joined()
        self._waiting: dict[object, dict[str, Tensor]] = {}
        self._alike: dict[object, list[Transfer] | None] = {}
        self._batch = _Batch()
        self._submitted: deque[_Batch] = deque()
        self._staged: deque[_Staged] = deque()
        self._copying: deque[torch.cuda.Event] = deque()
        self._ring = Ring(WINDOW)
        self._pool: ThreadPoolExecutor

    def run(self, threads: int) -> None:
        """Read and execute everything, in the order of the files."""
        import torch

        tasks, source = self.plan.by_source(), self.plan.source
        with ExitStack() as opened:
            files = {}
            for name in dict.fromkeys(source[name].file for name in tasks):
                files[name] = SafetensorsFile(self.root / name, name, source)
                opened.callback(files[name].close)
            torch.set_num_threads(1)  # the threads of the pool divide the work
            self._pool = ThreadPoolExecutor(max(threads - 1, 1), "port-kit-read", torch.set_num_threads, (1,))
            opened.callback(self._pool.shutdown, cancel_futures=True)
            for name in sorted(tasks, key=lambda name: (source[name].file, source.places[name])):
                self._source(files[source[name].file], name, tasks[name])
            self._flush()
            while self._staged:
                self._start_copy()
            for batch in reversed(self._submitted if threads > 1 else ()):
                batch.steal()
            for batch in self._submitted:
                batch.wait()
        for target in {task.target for task in self.plan.tasks}:
            for region in self.executor.targets[target].padding:  # as the parameter's own loader does
                self.executor.targets[target].memory[region_index(region)].zero_()

    def _source(self, file: SafetensorsFile, name: str, tasks: Sequence[CopyTask]) -> None:
        """Read the byte ranges of one source's tasks."""
        targets, spec = self.executor.targets, self.plan.source[name]
        transfers = [(task, self._transfers(task)) for task in tasks]
        if all(found is not None for _, found in transfers):
            for task, found in transfers:
                for transfer in found or ():
                    self._transfer(file, name, task, transfer)
            return
        if any(targets[task.target].memory.numel() < self.executor.specs[task.target].numel for task in tasks):
            self.read_whole.append(name)
        self.bytes_read += spec.nbytes
        self._run(tasks, file.tensor(name))

    def _transfers(self, task: CopyTask) -> list[Transfer] | None:
        """Return the transfers of a task, computed once for tasks that are alike."""
        target = self.executor.targets[task.target]
        # objects that tasks and targets of alike layers share, and that the plan keeps alive
        key = (id(task.ops), id(task.region), id(task.join), id(target.shards), target.memory.shape)
        if key not in self._alike:
            self._alike[key] = _transfers(task, target)
        return self._alike[key]

    def _transfer(self, file: SafetensorsFile, name: str, task: CopyTask, transfer: Transfer) -> None:
        """Read a region into this rank's memory, through a buffer if that is on a GPU."""
        spec, target = self.plan.source[name], self.executor.targets[task.target]
        memory = target.memory
        into = memory[transfer.local] if transfer.local else memory
        self.bytes_read += math.prod(transfer.shape) * ITEM_SIZES[spec.dtype]
        same_bytes = spec.dtype == target.spec.dtype and not transfer.permutations
        if memory.is_cuda:
            self._stage(file, name, task, transfer, into)
        elif same_bytes and (not task.ops or into.is_contiguous()):
            into = into if into.shape == transfer.shape else into.view(transfer.shape)
            start = self.plan.source.places[name]
            for part, piece in file.pieces(name, transfer.source, into):
                self._batch.add_copy(file, (start, start + spec.nbytes), part, piece)
                self._submit([], part.nbytes)
        else:
            piece = file.tensor(name)[region_index(transfer.source)]
            self._submit([partial(self._write, task, transfer, into, piece)], into.nbytes)

    def _submit(self, reads: Iterable[Callable[[], object]], nbytes: int) -> _Batch:
        """Hand reads over to the threads, many small ones together."""
        batch = self._batch
        batch.reads += reads
        batch.nbytes += nbytes
        if batch.nbytes >= BLOCK:
            self._flush()
        return batch

    def _flush(self) -> None:
        while self._submitted and self._submitted[0].done:
            self._submitted.popleft().wait()
        if self._batch.reads or self._batch.memory:
            self._batch.result = self._pool.submit(self._batch.run)
            self._submitted.append(self._batch)
        self._batch = _Batch()

    def _stage(self, file: SafetensorsFile, name: str, task: CopyTask, transfer: Transfer, into: Tensor) -> None:
        """Read a region into page-locked memory ahead of its copy to a GPU, in blocks of rows if the axes stay."""
        import torch

        dtype, extents = getattr(torch, self.plan.source[name].dtype), transfer.shape
        size = math.prod(extents) * dtype.itemsize
        same_rows = bool(extents) and not transfer.permutations and into.shape[:1] == extents[:1]
        rows = extents[0] if same_rows else 1
        count = min(rows, -(-size // BLOCK))
        if size > count * WINDOW:
            self._write(task, transfer, into, file.tensor(name)[region_index(transfer.source)])
            return
        for at in range(count):
            low, high = rows * at // count, rows * (at + 1) // count
            region, part = transfer.source, into
            if count > 1:
                first = region[0][0]
                region, part = with_span(region, 0, first + low, first + high), into[low:high]
            length = size * (high - low) // rows
            start = self._reserve(length)
            buffer = self._page_locked[start : start + length].view(dtype).view(region_shape(region))
            batch = self._submit(file.reads(name, region, buffer), length)
            self._staged.append(_Staged(batch, partial(self._write, task, transfer, part, buffer)))

    @cached_property
    def _page_locked(self) -> Tensor:
        import torch

        return torch.empty(WINDOW, dtype=torch.uint8, device="cpu", pin_memory=True)

    def _reserve(self, size: int) -> int:
        """Return the start of a free span of the page-locked memory."""
        while self._staged and self._staged[0].batch.done:
            self._start_copy()
        while (start := self._ring.take(size)) is None:
            if not self._copying:
                self._start_copy()
            self._copying.popleft().synchronize()
            self._ring.give_back()
        return start

    def _start_copy(self) -> None:
        """Wait for the oldest region that is being read, and start its copy."""
        import torch

        batch, copy = self._staged.popleft()
        if batch.result is None:
            self._flush()
        batch.wait()
        copy()
        self._copying.append(torch.cuda.Event())
        self._copying[-1].record()

    def _write(self, task: CopyTask, transfer: Transfer, into: Tensor, piece: Tensor) -> None:
        """Copy a region into this rank's memory; casts and permutations are done on its device."""
        if piece.dtype == into.dtype and not transfer.permutations:
            into.copy_(piece.reshape(into.shape), non_blocking=True)
            return
        piece = piece.to(into.device, non_blocking=True)
        for perm in transfer.permutations:
            piece = piece.permute(perm)
        self.executor.write(task._replace(ops=()), into, piece.reshape(into.shape))

    def _run(self, tasks: Sequence[CopyTask], tensor: Tensor) -> None:
        """Execute the tasks of a source that is read completely; transforms wait for their other sources."""
        for task in {task.group if task.join is not None else task: task for task in tasks}.values():
            group = self._joined[task.group] if task.join is not None else [task]
            tensors = self._waiting.setdefault(task.group, {}) if task.join is not None else {}
            tensors[task.source] = self._on_device(task, tensor)
            if len(tensors) == len({each.source for each in group}):
                self.executor.run(group, tensors)
                self._waiting.pop(task.group, None)

    def _on_device(self, task: CopyTask, tensor: Tensor) -> Tensor:
        """Return a source on its target's device; computed values stay on the CPU, as a GPU rounds differently."""
        if task.join is not None or any(isinstance(op, Call) for op in task.ops):
            return tensor
        return tensor.to(self.executor.targets[task.target].memory.device, non_blocking=True)


def _transfers(task: CopyTask, target: Target) -> list[Transfer] | None:
    """Return the transfers of a task for this rank, or None if its source has to be read completely."""
    if task.join is not None or not _can_cut(task.ops) or not target.is_described:
        return None
    permutations = tuple(op.perm for op in task.ops if isinstance(op, Permute))
    found: list[Transfer] = []
    for shard in target.shards or ():
        needed = intersection(task.region, shard.held)
        if needed is None:
            continue
        regions = source_region(task.ops, [relative_to(needed, task.region)])
        if len(regions) != 1:
            return None
        local = shifted(relative_to(needed, shard.held), shard.local)
        index = () if region_shape(local) == target.memory.shape else region_index(local)
        found.append(Transfer(regions[0], region_shape(regions[0]), index, permutations))
    return found


def _can_cut(ops: Sequence[TensorOp]) -> bool:
    """Return True if a region of the result is a region of the source, with its elements in order up to the axes."""
    permutes = any(isinstance(op, Permute) for op in ops)
    reshapes = any(isinstance(op, Reshape) for op in ops)
    return not (permutes and reshapes) and not any(isinstance(op, (Call, Cast)) or hasattr(op, "invert") for op in ops)
