"""CUDA stream memory operations: write a 32-bit value, or wait for one, in stream order.

They use ``cuda-bindings``, a requirement of PyTorch's CUDA builds. Unlike a spinning kernel, they do not occupy an SM.
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

#: Values are compared modulo 2**32.
MASK_32BIT = 0xFFFFFFFF


@cache
def is_installed() -> bool:
    """Return True if ``cuda-bindings`` is installed, without importing it. Logs a warning if it is missing."""
    found = find_spec("cuda") is not None and find_spec("cuda.bindings") is not None
    if not found:
        logger.warning("cuda-bindings is not installed; using NCCL for all transfers (pip install cuda-bindings)")
    return found


def stream_write_value(address: Tensor, value: int) -> None:
    """Write a value after all work launched on the current stream.

    Args:
        address: tensor whose first four bytes are written; may be on a peer GPU.
        value: taken modulo 2**32.
    """
    _call("cuStreamWriteValue32", address, value)


def stream_wait_value(address: Tensor, value: int) -> None:
    """Make the current stream wait until a value is reached.

    Args:
        address: tensor on this GPU whose first four bytes are compared.
        value: minimum, modulo 2**32.
    """
    _call("cuStreamWaitValue32", address, value)


def _call(name: str, address: Tensor, value: int) -> None:
    stream = torch.cuda.current_stream().cuda_stream
    default = 0  # write: with a memory barrier; wait: cyclic greater-or-equal
    result: tuple[Any, ...] = getattr(_driver(), name)(stream, address.data_ptr(), value & MASK_32BIT, default)
    if int(result[0]):
        raise RuntimeError(f"{name} failed: {result[0]!r}. Set PORT_KIT_DISABLE_SYMM_MEM=1 to use NCCL instead.")


@cache
def _driver() -> Any:
    return import_module("cuda.bindings.driver")
