"""Signals between GPUs in stream order, by CUDA stream memory operations.

They use ``cuda-bindings``, a requirement of PyTorch's CUDA builds. Unlike a spinning kernel, they do not occupy an SM.
CUDA graphs can capture them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


@cache
def is_installed() -> bool:
    """Return True if ``cuda-bindings`` is installed, without importing it. Logs a warning if it is missing."""
    found = find_spec("cuda") is not None and find_spec("cuda.bindings") is not None
    if not found:
        logger.warning("cuda-bindings is not installed; using NCCL for all transfers (pip install cuda-bindings)")
    return found


class PeerSignals:
    """Signals to and from peers, as one call of the driver: set those of the peers, wait for the own ones, clear them.

    A signal is a 32-bit word that is 1 from :meth:`exchange` of the sender to that of the receiver, and else 0. The
    call has the same arguments each time, as the replay of a graph requires.

    Args:
        outgoing: per peer, the tensor of one int32 on its GPU that this rank sets.
        incoming: per peer, the tensor of one int32 on this GPU that the peer sets.
    """

    def __init__(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> None:
        driver = _driver()
        kinds = driver.CUstreamBatchMemOpType
        write, wait = kinds.CU_STREAM_MEM_OP_WRITE_VALUE_32, kinds.CU_STREAM_MEM_OP_WAIT_VALUE_32
        self._operations = [
            *(_operation(write, word, 1) for word in outgoing),
            *(_operation(wait, word, 1) for word in incoming),
            *(_operation(write, word, 0) for word in incoming),
        ]

    def exchange(self) -> None:
        """Signal all peers after the work launched on the current stream, then make the stream wait for their signals.

        Raises:
            RuntimeError: the driver refused the call.
        """
        stream = torch.cuda.current_stream().cuda_stream
        (result,) = _driver().cuStreamBatchMemOp(stream, len(self._operations), self._operations, 0)
        if int(result):
            raise RuntimeError(f"cuStreamBatchMemOp failed: {result}. Set PORT_KIT_DISABLE_SYMM_MEM=1 to use NCCL.")


def _operation(kind: Any, word: Tensor, value: int) -> Any:
    driver = _driver()
    operation = driver.CUstreamBatchMemOpParams()
    writes = kind == driver.CUstreamBatchMemOpType.CU_STREAM_MEM_OP_WRITE_VALUE_32
    operation.operation = kind
    part = operation.writeValue if writes else operation.waitValue
    part.operation = kind
    part.address = word.data_ptr()
    part.value = value
    part.flags = 0  # write: after a memory barrier; wait: until the word is at least the value
    return operation


@cache
def _driver() -> Any:
    return import_module("cuda.bindings.driver")
