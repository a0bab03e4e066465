"""Layout checks before an engine's workers start.

vLLM-Omni calls a pipeline's post-process factory with the engine's configuration in the process that creates ``Omni``,
before any worker starts. :func:`port_kit.pipeline.process_funcs.get_post_process_func` calls :func:`check_engine`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from port_kit.errors import ParallelError
from port_kit.parallel.layout import ULYSSES_MODES, Layout, divisors
from port_kit.parallel.meta_init import meta_init
from port_kit.parallel.preflight import GIGABYTE, Preflight, describe_model, preflight
from port_kit.upstream.checks import require

if TYPE_CHECKING:
    from torch import nn
    from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig

logger = logging.getLogger(__name__)


def layout_of(config: DiffusionParallelConfig) -> Layout:
    """Return an engine's degrees as a :class:`Layout`.

    Raises:
        ParallelError: an unsupported combination of degrees.
    """
    require("engine_config")
    shards = config.hsdp_shard_size if config.hsdp_shard_size > 0 else config.world_size
    return Layout(
        tp=config.tensor_parallel_size,
        hsdp=shards if config.use_hsdp else 1,
        ulysses=config.ulysses_degree,
        ring=config.ring_degree,
        allgather=config.allgather_degree,
        cfg=config.cfg_parallel_size,
        uaa=config.ulysses_degree > 1 and config.ulysses_mode == ULYSSES_MODES[1],
    )


def check_engine(
    config: OmniDiffusionConfig, build: Callable[[], Sequence[nn.Module]], *, branches: int
) -> Preflight | None:
    """Check an engine's layout against a model. Reads no weights and touches no device.

    Args:
        config: the engine's configuration.
        build: builds the denoisers; called once on the meta device if there are several ranks.
        branches: guidance branches per step.

    Returns:
        Weight bytes per rank; None for one rank.

    Raises:
        ParallelError: the model does not support the layout; the hint lists supported layouts with their weight bytes.
    """
    check_cache(config, branches=branches)
    layout = layout_of(config.parallel_config)
    if layout.world == 1:
        return None
    with meta_init(config.dtype):
        shape = describe_model(*build(), branches=branches)
    plan = preflight(layout, shape)
    logger.info(
        "%s: %.2f GB of transformer weights per rank, %.2f GB while a block runs",
        layout,
        plan.weight_bytes / GIGABYTE,
        plan.peak_weight_bytes / GIGABYTE,
    )
    return plan


def check_cache(config: OmniDiffusionConfig, *, branches: int) -> None:
    """Check that all ranks run equally many branches if Cache-DiT is on.

    Ranks decide together at each transformer call whether to reuse the cache.

    Raises:
        ParallelError: ``cache_passes``; the hint lists supported values of ``cfg_parallel_size``.
    """
    ranks = config.parallel_config.cfg_parallel_size
    if config.cache_backend == "cache_dit" and branches % ranks:
        raise ParallelError(
            f"cache_dit needs equally many branches per rank: got {branches} branches on {ranks} ranks",
            code="cache_passes",
            hint=f"set cfg_parallel_size to {' or '.join(map(str, divisors(branches)))}, or disable the cache",
        )
