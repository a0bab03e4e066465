"""Cache-DiT with guidance of more than two passes: which passes of a step a rank's cache has to keep apart."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn
from vllm_omni.diffusion.distributed.parallel_state import get_classifier_free_guidance_rank

from port_kit.parallel.guard import check_cache

if TYPE_CHECKING:
    from vllm_omni.diffusion.data import OmniDiffusionConfig


def arrange_cache(transformer: nn.Module, od_config: OmniDiffusionConfig, *, passes: int) -> None:
    """Tell Cache-DiT how often this rank calls the transformer in one step.

    Cache-DiT compares a block's residual with that of the call before: it can keep two passes of a step apart, or
    have one, and would otherwise compare a pass with another pass of the same step and reuse the wrong residuals.

    Args:
        transformer: gets an adapter configuration of its own; the class keeps its.
        od_config: says whether Cache-DiT is on, and over how many ranks the passes go.
        passes: guidance passes of one step; pass ``i`` runs on rank ``i`` modulo the number of ranks.

    Raises:
        ParallelError: a rank would run more than two passes.
    """
    if od_config.cache_backend != "cache_dit":
        return
    check_cache(od_config, passes=passes)
    ranks = od_config.parallel_config.cfg_parallel_size
    own = len(range(get_classifier_free_guidance_rank(), passes, ranks))
    declared: Any = transformer._cache_dit_adapter_config
    transformer._cache_dit_adapter_config = replace(declared, has_separate_cfg=own == 2)
