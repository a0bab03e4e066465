"""What CUDA's driver does on a stream by itself, without a kernel: write a value, and wait for one.

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
MASK_32BIT = 0xFFFFFFFF


@cache
def is_installed() -> bool:
    """Whether the bindings are there; where they are not, a warning says how to get them. Imports nothing of them."""
    found = find_spec("cuda") is not None and find_spec("cuda.bindings") is not None
    if not found:
        logger.warning("NCCL carries what copy engines could: cuda-bindings is missing (pip install cuda-bindings)")
    return found


def stream_write_value(address: Tensor, value: int) -> None:
    """Write after everything that was launched on the current stream before; ``address`` may be another GPU's.

    Args:
        address: its first four bytes are written.
        value: modulo 2**32.
    """
    _call("cuStreamWriteValue32", address, value)


def stream_wait_value(address: Tensor, value: int) -> None:
    """Let the current stream wait until the first four bytes of ``address``, of this GPU, are at least ``value``."""
    _call("cuStreamWaitValue32", address, value)


def _call(name: str, address: Tensor, value: int) -> None:
    stream = torch.cuda.current_stream().cuda_stream
    default = 0  # writes: after a memory barrier; waits: until it is at least the value, cyclically
    result: tuple[Any, ...] = getattr(_driver(), name)(stream, address.data_ptr(), value & MASK_32BIT, default)
    if int(result[0]):
        raise RuntimeError(
            f"{name} was refused by CUDA's driver: {result[0]!r}; PORT_KIT_DISABLE_SYMM_MEM=1 leaves it out"
        )


@cache
def _driver() -> Any:
    return import_module("cuda.bindings.driver")
