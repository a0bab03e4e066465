"""Declaration of a plan's Cache-DiT patterns to vLLM-Omni, which enables, refreshes and disables the cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cache_dit import BlockAdapter, ForwardPattern
from cache_dit.caching.cache_adapters.cache_adapter import CachedAdapter
from torch import nn
from vllm_omni.diffusion.cache.cachedit.config import CacheDiTAdapterConfig

from port_kit.autoparallel.boundaries import Boundary
from port_kit.autoparallel.cache.region import Member, Region, cache_block
from port_kit.autoparallel.plan import Blocks, Plan, find
from port_kit.autoparallel.tree import Arguments
from port_kit.errors import ParallelError
from port_kit.upstream.checks import require

require("cache_adapter")

#: Attribute of a module with its :class:`CachedLists`.
_LISTS = "_port_kit_cached_lists"


@dataclass
class CachedLists:
    """Lists of blocks of one module that Cache-DiT reuses.

    Attributes:
        lists: sections of the plan with a pattern, by name of the list.
        followers: sections whose calls alternate with those of another list.
        boundaries: token boundaries of blocks.
        regions: one per list, by name; set while the cache is enabled.
    """

    lists: Mapping[str, Blocks]
    followers: tuple[Blocks, ...]
    boundaries: Mapping[nn.Module, Boundary]
    regions: dict[str, Region] = field(default_factory=dict)

    def reset(self, *_: Any) -> None:
        """Leave all regions at the start of a forward: the one before may have failed inside of one."""
        for region in self.regions.values():
            region.active = False

    def install(self, model: nn.Module, name: str, context: str, manager: Any) -> None:
        """Call the blocks of a list, and of those that follow it, through one region."""
        leader = self.lists[name]
        blocks = find(model, leader.modules).values()
        region = self.regions[name] = Region(manager, context, name, len(blocks))
        for index, block in enumerate(blocks):
            self._cache(block, leader, region, index)
        for follower in self.followers:
            if follower.cache_with == leader.modules:
                for block in find(model, follower.modules).values():
                    self._cache(block, follower, region, None)

    def _cache(self, block: nn.Module, section: Blocks, region: Region, index: int | None) -> None:
        boundary = self.boundaries.get(block)
        cache_block(block, Member(region, index, Arguments(block), section.cache_states, boundary))


class PlanAdapter(CachedAdapter):  # type: ignore[misc]
    """Adapter of Cache-DiT that keeps the lists of a module and its loops over them."""

    @classmethod
    def collect_unified_blocks(cls, block_adapter: BlockAdapter, contexts_kwargs: Any) -> list[dict[str, Any]]:
        """Return the lists themselves: their blocks are called through regions."""
        BlockAdapter.assert_normalized(block_adapter)
        collected = []
        for model, lists, names, contexts in zip(
            block_adapter.transformer,
            block_adapter.blocks,
            block_adapter.blocks_name,
            block_adapter.unique_blocks_name,
            strict=True,
        ):
            for name, context in zip(names, contexts, strict=True):
                cached_lists(model).install(model, name, context, block_adapter.pipe._context_manager)
            collected.append(dict(zip(contexts, lists, strict=True)))
        return collected


def declare_cache(model: nn.Module, plan: Plan, boundaries: Mapping[nn.Module, Boundary] | None = None) -> None:
    """Declare to vLLM-Omni which lists of blocks Cache-DiT reuses.

    Args:
        model: the module.
        plan: its plan.
        boundaries: token boundaries of its blocks, under sequence parallelism.

    Raises:
        ParallelError: ``plan_cache``; the plan has no pattern. ``plan_pattern``; the module lacks a list.
    """
    lists = {blocks.modules.removesuffix(".*"): blocks for blocks in plan.blocks if blocks.cache_pattern}
    if not lists:
        reasons = [f"{blocks.modules}: {blocks.cache_reason}" for blocks in plan.blocks if blocks.cache_reason]
        raise ParallelError(
            f"the plan of {plan.subject} has no pattern for Cache-DiT" + "".join(f"; {reason}" for reason in reasons),
            code="plan_cache",
            hint=f"infer it again: port-kit plan infer {plan.subject} -o plan.toml",
        )
    for blocks in lists.values():
        find(model, blocks.modules)
    followers = tuple(blocks for blocks in plan.blocks if blocks.cache_with)
    cached = CachedLists(lists, followers, boundaries or {})
    model.register_forward_pre_hook(cached.reset)
    setattr(model, _LISTS, cached)
    model._cache_dit_adapter_config = CacheDiTAdapterConfig(  # type: ignore[assignment]
        block_forward_patterns={name: ForwardPattern[blocks.cache_pattern] for name, blocks in lists.items()},
        cached_adapter_cls=PlanAdapter,
        check_forward_pattern=False,
    )


def cached_lists(model: nn.Module) -> CachedLists:
    """Return the lists of a module whose plan was declared."""
    found: CachedLists = getattr(model, _LISTS)
    return found
