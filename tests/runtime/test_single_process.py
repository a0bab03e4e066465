"""A process group of one rank in a separate process."""

from __future__ import annotations

import huggingface_hub.constants
import torch

from port_kit.runtime.single_process import single_rank
from port_kit.testing.workers import run_ranks, warm_up


def _describe(_rank: int) -> list[object]:
    """Return what a process group sets, within it and after it."""
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    with single_rank(torch.bfloat16) as config:
        within = [config.dtype, torch.get_default_dtype(), torch.distributed.get_world_size()]
    return [*within, torch.get_default_dtype(), torch.distributed.is_initialized()]


def test_a_process_group_of_one_needs_no_hub() -> None:
    warm_up()
    assert run_ranks(1, _describe) == [[torch.bfloat16, torch.bfloat16, 1, torch.float32, False]]
