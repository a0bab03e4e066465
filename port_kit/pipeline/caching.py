"""Cache-DiT with guidance: one cache context per branch of a step.

Cache-DiT compares the residual of a block with that of the previous call. It separates two branches. With more of them
it would compare branches with each other and reuse the wrong residuals. Here each branch has its own context, which is
installed before the transformer is called.

A model with several transformers has contexts for each of them. When a request goes on with another transformer, those
of the one before are released.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn
from vllm_omni.diffusion.distributed.parallel_state import get_classifier_free_guidance_rank

from port_kit.parallel.engine_checks import check_cache
from port_kit.pipeline.model_index import port_of_model
from port_kit.upstream.checks import require

if TYPE_CHECKING:
    from vllm_omni.diffusion.data import OmniDiffusionConfig


def configure_caches(transformers: Sequence[nn.Module], od_config: OmniDiffusionConfig) -> list[BranchCacheContexts]:
    """Prepare transformers for Cache-DiT, if it is on: one context per branch that this rank runs in a step.

    Branch ``i`` of the port's guidance branches runs on rank ``i`` modulo the number of ranks.

    Args:
        transformers: of one pipeline. Each gets its own adapter configuration; that of the class is not changed.
        od_config: the engine's configuration; its model directory names the port.

    Returns:
        The hooks; none if the cache is off.

    Raises:
        ParallelError: ranks would run unequal numbers of branches.
        PortNotFoundError: no port serves the model's class.
    """
    if od_config.cache_backend != "cache_dit":
        return []
    branches = port_of_model(str(od_config.model)).guidance_branches
    check_cache(od_config, branches=branches)
    require("cache_contexts")
    own = len(range(get_classifier_free_guidance_rank(), branches, od_config.parallel_config.cfg_parallel_size))
    hooks = [BranchCacheContexts(own) for _ in transformers]
    for transformer, hook in zip(transformers, hooks, strict=True):
        declared: Any = transformer._cache_dit_adapter_config
        transformer._cache_dit_adapter_config = replace(declared, has_separate_cfg=False)
        hook.others = [other for other in hooks if other is not hook]
        if own > 1 or hook.others:
            transformer.register_forward_pre_hook(hook)
    return hooks


class BranchCacheContexts:
    """Forward pre-hook that installs the context of the next branch.

    vLLM-Omni makes a new context per request. An unknown context therefore marks the first branch of a request.

    Args:
        branches: of one step, on this rank, always in the same order. None if :meth:`end_step` tells the steps apart:
            their numbers of branches may then differ, and contexts last until the request ends.

    Attributes:
        others: hooks of the pipeline's other transformers. Their contexts are released at the first call of a request.
    """

    def __init__(self, branches: int | None = None) -> None:
        self.branches = branches
        self.others: list[BranchCacheContexts] = []
        self.installed: dict[str, Any] = {}
        self.calls = 0
        self.fresh: dict[str, Any] = {}
        self.kept: dict[str, list[Any]] = {}

    def end_step(self) -> None:
        """Begin with the first branch at the next call."""
        self.calls = 0

    def release(self) -> None:
        """Forget what the branches of a request left behind; the next call begins anew."""
        for name in self.kept:
            self.installed[name] = copy.deepcopy(self.fresh[name])
        self.kept.clear()

    def __call__(self, transformer: nn.Module, args: tuple[Any, ...]) -> None:
        """Replace the contexts of all lists of blocks; do nothing while the cache is off."""
        manager: Any = getattr(transformer, "_context_manager", None)
        if manager is None:
            return
        contexts, names = manager._cached_context_manager, transformer._context_names
        self.installed = contexts
        for name in names:
            if not any(contexts[name] is known for known in self.kept.get(name, ())):
                self._begin(name, contexts[name])
        branch = self.calls if self.branches is None else self.calls % self.branches
        for name in names:
            kept = self.kept[name]
            kept += [copy.deepcopy(self.fresh[name]) for _ in range(branch + 1 - len(kept))]
            contexts[name] = kept[branch]
        self.calls += 1

    def _begin(self, name: str, context: Any) -> None:
        """Begin a request with the context of its first branch."""
        if self.branches is None:  # Cache-DiT would begin again after this number of calls
            context.cache_config.num_inference_steps = None
        self.fresh[name], self.kept[name], self.calls = copy.deepcopy(context), [context], 0
        for other in self.others:
            other.release()
