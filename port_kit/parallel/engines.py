"""What CUDA does on a stream without a multiprocessor: copies of rows, and numbers that ranks meet by.

Through NVIDIA's own Python bindings, which PyTorch's CUDA builds require; PyTorch copies with an engine only where both
sides are contiguous, and waits for another GPU with a kernel.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor


#: Bytes of a row below which a copy engine loses more to its begin than it gains.
NARROW = 512


class Rows(NamedTuple):
    """A tensor as rows of bytes that begin at equal distances.

    Attributes:
        height: how many rows.
        width: bytes of a row.
        pitch: bytes from one row's begin to the next's.
    """

    height: int
    width: int
    pitch: int


def available() -> bool:
    """Whether the bindings are installed."""
    try:
        return find_spec("cuda.bindings") is not None
    except ModuleNotFoundError:
        return False


def rows_of(x: Tensor) -> Rows | None:
    """Return how the elements of ``x``, in order, lie in memory; None where they are no such rows."""
    width = x.itemsize
    sizes, strides = list(x.shape), [stride * x.itemsize for stride in x.stride()]
    while sizes and (sizes[-1] == 1 or strides[-1] == width):
        width *= sizes.pop()
        strides.pop()
    height, pitch = 1, width
    while sizes:
        size, stride = sizes.pop(), strides.pop()
        if size == 1:
            continue
        if height == 1:
            pitch = stride
        elif stride != height * pitch:
            return None
        height *= size
    return Rows(height, width, pitch) if pitch >= width else None


def copy_rows(to: Tensor, x: Tensor) -> None:
    """Copy between tensors of one shape and dtype; on a GPU with a copy engine, where both are rows.

    Raises:
        RuntimeError: CUDA refused.
    """
    pair = _alike(rows_of(to), rows_of(x)) if to.is_cuda and x.numel() else None
    # contiguous on both sides: PyTorch does the same; narrow rows: a kernel is faster
    if pair is None or pair[0].height == 1 or pair[0].width < NARROW:
        to.copy_(x)
        return
    target, source = pair
    runtime = import_module("cuda.bindings.runtime")
    stream = torch.cuda.current_stream(to.device).cuda_stream
    places = to.data_ptr(), target.pitch, x.data_ptr(), source.pitch
    kind = runtime.cudaMemcpyKind.cudaMemcpyDefault
    _check(runtime.cudaMemcpy2DAsync(*places, source.width, source.height, kind, stream))


def _alike(a: Rows | None, b: Rows | None) -> tuple[Rows, Rows] | None:
    """Return both with rows of one width, where one of them is contiguous if they differ; else None."""
    if a is None or b is None or a.width == b.width:
        return None if a is None or b is None else (a, b)
    if a.height == 1 and a.width % b.width == 0:
        return Rows(b.height, b.width, b.width), b
    if b.height == 1 and b.width % a.width == 0:
        return a, Rows(a.height, a.width, a.width)
    return None


def write_number(address: int, value: int, stream: int) -> None:
    """Have a number written, modulo 2**32, after all that was launched on the stream before, other GPUs' memory too."""
    _check(import_module("cuda.bindings.driver").cuStreamWriteValue32(stream, address, value & 0xFFFFFFFF, 0))


def wait_for_number(address: int, value: int, stream: int) -> None:
    """Have the stream wait until the number is at least ``value``, in 32 bits that may wrap."""
    _check(import_module("cuda.bindings.driver").cuStreamWaitValue32(stream, address, value & 0xFFFFFFFF, 0))


def _check(result: tuple[Any, ...]) -> None:
    if int(result[0]):
        raise RuntimeError(f"CUDA refused what GPUs exchange by ({result[0]}); set PORT_KIT_PEER_COPIES=0")
