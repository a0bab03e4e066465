"""Reading a safetensors checkpoint ahead of its load: threads fill a few staging buffers, a device copies out of them.

A tensor of a mapped file is read when it is copied, a page at a time, by the one thread that copies it, and a GPU takes
it through a buffer of its driver's. Here a few threads read large pieces of the files in the order in which they lie,
into a ring of page-locked buffers; out of those the device copies by itself while the next are read. Tensors arrive on
the device in the checkpoint's own dtype, one after the other, whatever then becomes of them. The ring is all the host
memory that it takes: :data:`BLOCK` times :data:`BLOCKS`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from port_kit.errors import PortKitError, RemapError
from port_kit.manifest import Manifest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Bytes that a thread reads at once, how many such buffers there are, and how many threads.
BLOCK = 16 << 20
BLOCKS = 16
THREADS = 8


@dataclass(frozen=True)
class _Piece:
    """A tensor in its file; ``start`` and ``stop`` are offsets of the file."""

    name: str
    file: int
    start: int
    stop: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Block:
    """What is read at once: a part of a file, which holds parts of one or more tensors."""

    file: int
    start: int
    stop: int


def read_ahead(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    prefix: str = "",
    block: int = BLOCK,
    blocks: int = BLOCKS,
    threads: int = THREADS,
) -> Generator[tuple[str, Tensor], None, None]:
    """Stream a checkpoint's tensors, reading ahead of whoever takes them.

    Close the stream (``contextlib.closing``) where it might not be taken to its end: that ends its threads.

    Args:
        folder: a safetensors file, folder or index.
        device: where the tensors are to be. On a GPU nothing waits: a tensor may be used in the current stream of the
            thread that takes it, as any other that was computed there.
        prefix: what stands before the names.
        block: bytes that are read at once.
        blocks: how many of them may be in host memory.
        threads: how many read.

    Yields:
        ``(name, tensor)`` in the order in which the tensors lie in the files. Every tensor has memory of its own.

    Raises:
        RemapError: ``manifest_invalid`` for a broken file, before anything is read; ``checkpoint_corrupt`` for one
            that ends while it is read; ``checkpoint_unreadable`` for an error of the system.
        ValueError: a number that is not positive.
    """
    for name, value in (("block", block), ("blocks", blocks), ("threads", threads)):
        if value < 1:
            raise ValueError(f"{name}={value}: at least 1 is required")
    paths, pieces = _pieces(Path(folder))
    return _stream(paths, pieces, device, prefix, block, blocks, threads)


def _stream(
    paths: Sequence[Path],
    pieces: Sequence[_Piece],
    device: str | torch.device,
    prefix: str,
    block: int,
    blocks: int,
    threads: int,
) -> Generator[tuple[str, Tensor], None, None]:
    import torch

    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    plan = _blocks(pieces, block)
    with ExitStack() as opened:
        ring = _Ring(paths, plan, opened, min(blocks, len(plan) or 1), block, threads, device)
        for piece in pieces:
            into = torch.empty(piece.stop - piece.start, dtype=torch.uint8, device=device)
            ring.fill(into, piece)
            yield prefix + piece.name, into.view(getattr(torch, piece.dtype)).view(piece.shape)


def _pieces(folder: Path) -> tuple[list[Path], list[_Piece]]:
    """The files of a checkpoint, and its tensors in the order in which they lie there."""
    manifest = Manifest.from_safetensors(folder)
    root = folder if folder.is_dir() else folder.parent
    files = list(dict.fromkeys(spec.file for spec in manifest.values()))
    numbers = {file: number for number, file in enumerate(files)}
    pieces = []
    for name, spec in manifest.items():
        start = manifest.places[name]
        pieces.append(_Piece(name, numbers[spec.file], start, start + spec.nbytes, spec.dtype, spec.shape))
    pieces.sort(key=lambda piece: (piece.file, piece.start, piece.stop))
    return [root / file for file in files], pieces


def _blocks(pieces: Sequence[_Piece], size: int) -> list[_Block]:
    """Cut what is to be read, without what lies between tensors, into blocks; none spans two files."""
    runs: list[list[int]] = []
    for piece in pieces:
        if piece.start == piece.stop:
            continue
        if runs and runs[-1][0] == piece.file and runs[-1][2] == piece.start:
            runs[-1][2] = piece.stop
        else:
            runs.append([piece.file, piece.start, piece.stop])
    return [_Block(file, at, min(at + size, stop)) for file, start, stop in runs for at in range(start, stop, size)]


class _Ring:
    """Staging buffers that threads fill with blocks, in order, and :meth:`fill` empties, in order.

    A thread takes a buffer first and a block then, both under one lock: so the first unread block always has a
    buffer, and whoever waits for it does not wait for ever.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        plan: Sequence[_Block],
        opened: ExitStack,
        buffers: int,
        size: int,
        threads: int,
        device: torch.device,
    ) -> None:
        import torch

        self._paths, self._plan, self._device = paths, plan, device
        on_gpu = device.type == "cuda"
        size = min(size, max((block.stop - block.start for block in plan), default=0))
        self._buffers = torch.empty(buffers, size, dtype=torch.uint8, device="cpu", pin_memory=on_gpu)
        self._memory = [memoryview(buffer.numpy()) for buffer in self._buffers]
        self._free: SimpleQueue[tuple[int, Any] | None] = SimpleQueue()
        self._turn = threading.Lock()
        self._numbers = iter(range(len(plan)))
        self._read: list[Future[int]] = [Future() for _ in plan]
        self._at = 0
        self._files = [self._open(path, opened) for path in paths]
        for number in range(buffers):
            self._free.put((number, None))
        workers = [threading.Thread(target=self._work, name="port-kit-read", daemon=True) for _ in range(threads)]
        opened.callback(self._end, workers)
        for worker in workers:
            worker.start()

    def fill(self, into: Tensor, piece: _Piece) -> None:
        """Copy one tensor's bytes out of the blocks that hold them; the next tensor's come after them."""
        at = piece.start
        while at < piece.stop:
            block = self._plan[self._at]
            try:
                number = self._read[self._at].result()
            except PortKitError as error:
                raise RemapError(f"{piece.name}: {error}", code=error.code, hint=error.hint) from error
            stop = min(piece.stop, block.stop)
            part = self._buffers[number, at - block.start : stop - block.start]
            into[at - piece.start : stop - piece.start].copy_(part, non_blocking=True)
            at = stop
            if at == block.stop:
                self._release(number)
                self._at += 1

    def _release(self, number: int) -> None:
        """Give a buffer back to the threads; they wait until the device has copied what is in it."""
        copied = None
        if self._device.type == "cuda":
            import torch

            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self._device))
        self._free.put((number, copied))

    def _work(self) -> None:
        while True:
            with self._turn:
                free = self._free.get()
                index = next(self._numbers, None) if free is not None else None
                if free is None or index is None:
                    self._free.put(free)  # for the next thread, so that it ends too
                    return
            number, copied = free
            try:
                if copied is not None:
                    copied.synchronize()
                self._read_block(self._plan[index], number)
            except BaseException as error:  # noqa: B036 - whatever it is, whoever waits for the block must hear of it
                self._read[index].set_exception(error)
            else:
                self._read[index].set_result(number)

    def _read_block(self, block: _Block, number: int) -> None:
        path, file = self._paths[block.file], self._files[block.file]
        length, done = block.stop - block.start, 0
        memory = self._memory[number][:length]
        try:
            # Ask for the whole block at once: the system's own reading ahead asks for a few pages after the other.
            os.posix_fadvise(file, block.start, length, os.POSIX_FADV_WILLNEED)
            while done < length:
                got = os.preadv(file, [memory[done:]], block.start + done)
                if not got:
                    raise RemapError(
                        f"{path} ends at byte {block.start + done:,} while it is read; "
                        f"at least {block.stop:,} bytes are required",
                        code="checkpoint_corrupt",
                        hint="something shortened the file; get it again",
                    )
                done += got
        except OSError as error:
            raise RemapError(
                f"{path} cannot be read at byte {block.start + done:,}: {error.strerror}",
                code="checkpoint_unreadable",
                hint="look at the disk, or at the network that the file lies behind",
            ) from error

    @staticmethod
    def _open(path: Path, opened: ExitStack) -> int:
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise RemapError(
                f"{path} cannot be opened: {error.strerror}", code="checkpoint_unreadable", hint="look at its rights"
            ) from error
        opened.callback(os.close, file)
        return file

    def _end(self, workers: Sequence[threading.Thread]) -> None:
        """End the threads, before the files are closed under them."""
        self._numbers = iter(())
        self._free.put(None)
        for worker in workers:
            worker.join()
