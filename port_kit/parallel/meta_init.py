"""A model's meta_init: its modules on the meta device, in any process, without process groups and without a device.

:func:`port_kit.runtime.single_process.single_rank` opens a world of one rank, which on a GPU machine touches the GPU.
Before an engine's workers start, the process that starts them must not; here vLLM's linears only see a group of one
rank.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class _Alone:
    """What vLLM's linears ask of their group while they are built."""

    rank_in_group: int = 0
    world_size: int = 1


@contextmanager
def meta_init(dtype: torch.dtype) -> Iterator[None]:
    """Let modules be built on the meta device as one rank alone would build them.

    Args:
        dtype: default dtype of new parameters, as in the engine.
    """
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm_omni.diffusion.config import set_current_diffusion_config
    from vllm_omni.diffusion.data import OmniDiffusionConfig
    from vllm_omni.diffusion.vllm_config import create_diffusion_vllm_config

    config = OmniDiffusionConfig(model="meta", dtype=dtype)
    group, default = parallel_state._TP, torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(_quiet("vllm"))
        stack.enter_context(set_current_vllm_config(create_diffusion_vllm_config(torch.device("cpu"), config)))
        stack.enter_context(set_current_diffusion_config(config))
        stack.callback(setattr, parallel_state, "_TP", group)
        stack.callback(torch.set_default_dtype, default)
        parallel_state._TP = _Alone()  # type: ignore[assignment]
        torch.set_default_dtype(dtype)
        stack.enter_context(torch.device("meta"))
        yield


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a logger from telling of the configuration, as if an engine started with it."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
