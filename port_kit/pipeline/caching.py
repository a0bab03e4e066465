"""Cache-DiT with guidance: every pass of a step has a memory of its own, however many of them a rank runs.

Cache-DiT compares a block's residual with that of the call before. It can keep the two passes of plain guidance apart;
with more of them it would compare a pass with another one of the same step, and reuse the wrong residuals. Here each
pass has its own context, put in place before the transformer is called, so that the cache sees one pass after step.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn
from vllm_omni.diffusion.distributed.parallel_state import get_classifier_free_guidance_rank

from port_kit.parallel.engine_checks import check_cache

if TYPE_CHECKING:
    from vllm_omni.diffusion.data import OmniDiffusionConfig


def arrange_cache(transformer: nn.Module, od_config: OmniDiffusionConfig, *, branches: int) -> None:
    """Prepare a transformer for Cache-DiT, if that is on: one context for each pass that this rank runs in a step.

    Args:
        transformer: gets an adapter configuration of its own; the class keeps its.
        od_config: says whether Cache-DiT is on, and over how many ranks the passes go.
        branches: guidance passes of one step; pass ``i`` runs on rank ``i`` modulo the number of ranks.

    Raises:
        ParallelError: ranks would run unequal numbers of passes.
    """
    if od_config.cache_backend != "cache_dit":
        return
    check_cache(od_config, branches=branches)
    own = len(range(get_classifier_free_guidance_rank(), branches, od_config.parallel_config.cfg_parallel_size))
    declared: Any = transformer._cache_dit_adapter_config
    transformer._cache_dit_adapter_config = replace(declared, has_separate_cfg=False)
    if own > 1:
        transformer.register_forward_pre_hook(PassContexts(own))


class PassContexts:
    """Puts the next pass's context in place before every call of the transformer.

    A new request gets a new context from vLLM-Omni; that one is not ours, which is how its first pass is known.

    Args:
        branches: of one step, on this rank, always in the same order.
    """

    def __init__(self, branches: int) -> None:
        self.branches = branches
        self.calls = 0
        self.kept: dict[str, list[Any]] = {}

    def __call__(self, transformer: nn.Module, args: tuple[Any, ...]) -> None:
        """Exchange the contexts of all lists of blocks; nothing while the cache is off."""
        manager: Any = getattr(transformer, "_context_manager", None)
        if manager is None:
            return
        contexts = manager._cached_context_manager
        for name in transformer._context_names:
            current = contexts[name]
            if not any(current is known for known in self.kept.get(name, ())):
                self.kept[name] = [current, *(copy.deepcopy(current) for _ in range(self.branches - 1))]
                self.calls = 0
            contexts[name] = self.kept[name][self.calls % self.branches]
        self.calls += 1
