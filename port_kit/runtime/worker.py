"""CPU versions of two worker functions: output packing, and the kernel of Ring attention.

:mod:`port_kit.runtime.patches` installs them; ``patches.md`` gives the reasons.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from vllm_omni.diffusion.data import AsyncDiffusionOutput, AsyncOutputKind
from vllm_omni.diffusion.ipc import pack_diffusion_output_shm

from port_kit.escape import reason_of

if TYPE_CHECKING:
    from vllm_omni.diffusion.data import DiffusionOutput
    from vllm_omni.diffusion.worker.diffusion_worker import WorkerProc

logger = logging.getLogger(__name__)

#: Errors of packing an output into shared memory. They fail the request, not the thread.
_PACKING_ERRORS = (OSError, MemoryError, RuntimeError, TypeError, ValueError)


def async_output_loop(worker: WorkerProc) -> None:
    """Pack and send outputs until the queue returns None. Runs in the worker's output thread.

    Upstream's loop copies outputs on a side stream and fails without an accelerator. On a CPU, outputs are in host
    memory already.
    """
    while (item := worker._async_output_queue.get()) is not None:
        output, output_id, _event = item
        try:
            worker._enqueue_result(_packed(output, output_id))
        finally:
            with worker._async_output_done:
                worker._async_output_pending = max(0, worker._async_output_pending - 1)
                worker._async_output_done.notify_all()


def _packed(output: DiffusionOutput, output_id: str) -> AsyncDiffusionOutput:
    """Return the message for one output: its tensors in shared memory, or an error."""
    try:
        pack_diffusion_output_shm(output)
    except _PACKING_ERRORS as error:
        logger.exception("failed to pack output %s into shared memory", output_id)
        return AsyncDiffusionOutput(
            kind=AsyncOutputKind.OUTPUT_READY,
            async_output_id=output_id,
            error=f"packing the output into shared memory failed: {reason_of(error)}",
        )
    return AsyncDiffusionOutput(kind=AsyncOutputKind.OUTPUT_READY, async_output_id=output_id, output=output)


def efficient_attention_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: torch.Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute ``aten::_scaled_dot_product_efficient_attention`` with the CPU's flash kernel.

    The arguments are the operator's; query, key and value are [B, N, S, H].

    Returns:
        Output [B, N, S, H], log-sum-exp [B, N, S] in float32, and two unused random-state scalars.
    """
    output, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_bias, scale=scale
    )
    unused = torch.zeros((), dtype=torch.long)
    return output, log_sum_exp, unused, unused.clone()
