"""What diffusion workers need on a CPU: host-side output packing, and the kernel that Ring attention calls.

Both replace or add to upstream code: :mod:`port_kit.runtime.patches` puts them in place, ``patches.md`` tells why.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from vllm_omni.diffusion.data import AsyncDiffusionOutput, AsyncOutputKind
from vllm_omni.diffusion.ipc import pack_diffusion_output_shm

if TYPE_CHECKING:
    from vllm_omni.diffusion.data import DiffusionOutput
    from vllm_omni.diffusion.worker.diffusion_worker import WorkerProc

logger = logging.getLogger(__name__)

#: What packing an output into shared memory can raise. The request then fails with a message; the thread goes on.
_PACKING_ERRORS = (OSError, MemoryError, RuntimeError, TypeError, ValueError)


def async_output_loop(worker: WorkerProc) -> None:
    """Pack outputs and send them, until None comes; runs in the worker's output thread.

    Upstream's loop copies from the device on a side stream of the current accelerator and fails where there is
    none. Outputs are in host memory here, so there is nothing to copy and nothing to wait for.
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
    """Return the message for one output: its tensors in shared memory, or the reason why they are not."""
    try:
        pack_diffusion_output_shm(output)
    except _PACKING_ERRORS as error:
        logger.exception("output %s could not be packed into shared memory", output_id)
        return AsyncDiffusionOutput(
            kind=AsyncOutputKind.OUTPUT_READY,
            async_output_id=output_id,
            error=f"packing the output into shared memory failed: {error}",
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
    """Compute ``aten::_scaled_dot_product_efficient_attention`` with the CPU's own flash kernel.

    Args are those of the operator; query, key, value [B, N, S, H]. Returns the output [B, N, S, H], the log-sum-exp
    [B, N, S] in float32 that Ring attention merges blocks with, and two scalars for a random state that is not used.
    """
    output, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_bias, scale=scale
    )
    unused = torch.zeros((), dtype=torch.long)
    return output, log_sum_exp, unused, unused.clone()
