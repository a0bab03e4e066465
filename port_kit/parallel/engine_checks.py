"""The check of an engine's layout before its workers start: what is impossible is refused while nothing is loaded.

vLLM-Omni calls a pipeline's post-process factory with the engine's configuration before it starts any worker, in the
process of whoever made the ``Omni``: that is where a port calls :func:`check_engine`. ::

    def get_post_process_func(od_config):
        check_engine(od_config, lambda: build_transformer(read_config(od_config.model)), branches=2)
        ...
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from port_kit.errors import ParallelError
from port_kit.parallel.layout import Layout, divisors
from port_kit.parallel.meta_init import meta_init
from port_kit.parallel.preflight import GIGABYTE, Preflight, describe_model, preflight

if TYPE_CHECKING:
    from torch import nn
    from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig

logger = logging.getLogger(__name__)


def layout_of(config: DiffusionParallelConfig) -> Layout:
    """Return an engine's degrees as a :class:`Layout`.

    Raises:
        ParallelError: a combination that does not exist.
    """
    shards = config.hsdp_shard_size if config.hsdp_shard_size > 0 else config.world_size
    return Layout(
        tp=config.tensor_parallel_size,
        hsdp=shards if config.use_hsdp else 1,
        ulysses=config.ulysses_degree,
        ring=config.ring_degree,
        allgather=config.allgather_degree,
        cfg=config.cfg_parallel_size,
    )


def check_engine(config: OmniDiffusionConfig, build: Callable[[], nn.Module], *, branches: int) -> Preflight | None:
    """Refuse what an engine cannot do with a model. Loads nothing, and touches no device.

    Args:
        config: the engine's.
        build: builds the transformer; it is called once, on the meta device, and only for several ranks.
        branches: of the transformer in one guided step.

    Returns:
        What each rank will hold; None for one rank.

    Raises:
        ParallelError: the layout is impossible for the model; says what is possible, and what a rank would hold then.
    """
    check_cache(config, branches=branches)
    layout = layout_of(config.parallel_config)
    if layout.world == 1:
        return None
    with meta_init(config.dtype):
        shape = describe_model(build(), branches=branches)
    plan = preflight(layout, shape)
    logger.info(
        "%s: %.2f GB of the transformer's weights a rank, %.2f GB while a block runs",
        layout,
        plan.weight_bytes / GIGABYTE,
        plan.peak_weight_bytes / GIGABYTE,
    )
    return plan


def check_cache(config: OmniDiffusionConfig, *, branches: int) -> None:
    """Refuse Cache-DiT where ranks would run unequal numbers of branches: they decide together at every call.

    Raises:
        ParallelError: with the degrees of guidance parallelism that are possible.
    """
    ranks = config.parallel_config.cfg_parallel_size
    if config.cache_backend == "cache_dit" and branches % ranks:
        raise ParallelError(
            f"cache_dit with {branches} guidance passes over {ranks} ranks, of which some would run more than others",
            code="cache_passes",
            hint=f"set cfg_parallel_size to {' or '.join(map(str, divisors(branches)))}, or leave the cache out",
        )
