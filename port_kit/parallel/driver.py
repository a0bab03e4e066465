"""What CUDA's driver does on a stream by itself, without a kernel: write a number, and wait for one.

A kernel that waits holds a multiprocessor. Through NVIDIA's Python bindings, which PyTorch's CUDA builds require.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

#: Numbers are compared in 32 bits that may wrap.
BITS = 0xFFFFFFFF


@cache
def is_installed() -> bool:
    """Whether the bindings are there; where they are not, a warning says how to get them. Imports nothing of them."""
    found = find_spec("cuda") is not None and find_spec("cuda.bindings") is not None
    if not found:
        logger.warning("NCCL carries what copy engines could: cuda-bindings is missing (pip install cuda-bindings)")
    return found


def write_number(place: Tensor, number: int) -> None:
    """Write after everything that was launched on the current stream before; ``place`` may be another GPU's.

    Args:
        place: its first four bytes are written.
        number: modulo 2**32.
    """
    _call("cuStreamWriteValue32", place, number)


def wait_for_number(place: Tensor, number: int) -> None:
    """Let the current stream wait until the first four bytes of ``place``, of this GPU, are at least ``number``."""
    _call("cuStreamWaitValue32", place, number)


def _call(name: str, place: Tensor, number: int) -> None:
    stream = torch.cuda.current_stream().cuda_stream
    default = 0  # writes: after a memory barrier; waits: until it is at least the number, cyclically
    result: tuple[Any, ...] = getattr(_driver(), name)(stream, place.data_ptr(), number & BITS, default)
    if int(result[0]):
        raise RuntimeError(f"{name} was refused by CUDA's driver: {result[0]!r}; PORT_KIT_PEER_COPIES=0 leaves it out")


@cache
def _driver() -> Any:
    return import_module("cuda.bindings.driver")
