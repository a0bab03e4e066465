"""Construction of modules on the meta device, without process groups.

:func:`port_kit.runtime.single_process.single_rank` initializes process groups and, on a GPU machine, CUDA. The process
that starts an engine's workers must do neither.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from port_kit.upstream.checks import require


@dataclass(frozen=True)
class _FirstRankGroup:
    """Stand-in for the tensor-parallel group that vLLM's linears read in their constructors."""

    rank_in_group: int = 0
    world_size: int = 1


@contextmanager
def meta_init(dtype: torch.dtype, ranks: int = 1) -> Iterator[None]:
    """Build modules on the meta device as on the first of the tensor-parallel ranks.

    Args:
        dtype: default dtype of new parameters; pass the engine's.
        ranks: tensor-parallel size.
    """
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm_omni.diffusion.config import set_current_diffusion_config
    from vllm_omni.diffusion.data import OmniDiffusionConfig
    from vllm_omni.diffusion.vllm_config import create_diffusion_vllm_config

    require("tensor_parallel_group")
    config = OmniDiffusionConfig(model="meta", dtype=dtype)
    group, default = parallel_state._TP, torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(_quiet("vllm"))
        stack.enter_context(set_current_vllm_config(create_diffusion_vllm_config(torch.device("cpu"), config)))
        stack.enter_context(set_current_diffusion_config(config))
        stack.callback(setattr, parallel_state, "_TP", group)
        stack.callback(torch.set_default_dtype, default)
        parallel_state._TP = _FirstRankGroup(world_size=ranks)  # type: ignore[assignment]
        torch.set_default_dtype(dtype)
        stack.enter_context(torch.device("meta"))
        yield


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Suppress a logger's messages about the configuration, which describe no engine."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
