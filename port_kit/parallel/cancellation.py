"""Cancellation of a request within a denoising step, between the blocks of a transformer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import distributed
from vllm_omni.diffusion.cancellation import check_request_cancellation

if TYPE_CHECKING:
    from vllm_omni.diffusion.data import OmniDiffusionConfig

#: Votes of several ranks during one call of a transformer. Each is an all-reduce of one integer in a CPU group.
VOTES = 4


@torch.compiler.disable
def check_cancellation_between_blocks(block: int, blocks: int, config: OmniDiffusionConfig | None) -> None:
    """End the call of the transformer if its requests were cancelled.

    A no-op without an engine.

    One rank checks before every block. Several ranks vote before some blocks, the same on every rank, and all end their
    calls at the same block: a rank that stopped alone would leave the others in a collective. Ranks that may run
    different numbers of calls per step cannot vote within a call; they vote between steps only.

    Args:
        block: index of the next block.
        blocks: number of blocks.
        config: of the engine; None outside of one.

    Raises:
        DiffusionRequestAbortedError: of vLLM-Omni; all requests of the call were cancelled.
    """
    is_alone = not distributed.is_initialized() or distributed.get_world_size() == 1
    if is_alone or (block % -(-blocks // VOTES) == 0 and _run_equal_calls(config)):
        check_request_cancellation()


def _run_equal_calls(config: OmniDiffusionConfig | None) -> bool:
    """Return True if all ranks call the transformer equally often: none computes branches or requests of its own."""
    if config is None:
        return True
    parallel = config.parallel_config
    return parallel.cfg_parallel_size == 1 and parallel.data_parallel_size == 1
