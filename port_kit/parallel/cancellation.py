"""Cancellation of a request within a denoising step, between the blocks of a transformer."""

from __future__ import annotations

import torch
from torch import distributed
from vllm_omni.diffusion.cancellation import check_request_cancellation


@torch.compiler.disable
def check_cancellation_between_blocks() -> None:
    """End the call of the transformer if its requests were cancelled; without an engine, do nothing.

    Several ranks have to decide together, or the others would wait in the next exchange for ever. The decision is an
    exchange of its own, too much for every block: several ranks check between steps only.

    Raises:
        DiffusionRequestAbortedError: of vLLM-Omni; all requests of the call were cancelled.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        check_request_cancellation()
