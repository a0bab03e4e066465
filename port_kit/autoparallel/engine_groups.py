"""Process groups, configurations and forward context of one rank of a layout, without an engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from port_kit.parallel.layout import Layout
from port_kit.upstream.checks import require

if TYPE_CHECKING:
    from vllm_omni.diffusion.data import OmniDiffusionConfig


@contextmanager
def engine_groups(layout: Layout, rank: int, rendezvous: Path, dtype: torch.dtype) -> Iterator[OmniDiffusionConfig]:
    """Initialize the process groups of a layout as vLLM-Omni's worker does, and enter its contexts.

    Args:
        layout: degrees of parallelism.
        rank: global rank of this process.
        rendezvous: path of a file that does not exist, the same on all ranks.
        dtype: dtype of the diffusion configuration.

    Yields:
        The ``OmniDiffusionConfig`` of the context.
    """
    from vllm.config import set_current_vllm_config
    from vllm_omni.diffusion.config import set_current_diffusion_config
    from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
    from vllm_omni.diffusion.distributed import parallel_state as state
    from vllm_omni.diffusion.forward_context import set_forward_context
    from vllm_omni.diffusion.vllm_config import create_diffusion_vllm_config

    require("process_groups")
    parallel = DiffusionParallelConfig(**layout.parallel_config)
    # an existing folder: other names are looked up on the Hub, which fails offline
    config = OmniDiffusionConfig(model=str(Path(__file__).parent), dtype=dtype, parallel_config=parallel)
    vllm_config = create_diffusion_vllm_config(torch.device("cpu"), config)
    with ExitStack() as stack:
        stack.enter_context(set_current_vllm_config(vllm_config))
        stack.enter_context(set_current_diffusion_config(config))
        stack.enter_context(set_forward_context(vllm_config=vllm_config, omni_diffusion_config=config))
        state.init_distributed_environment(
            world_size=layout.world, rank=rank, local_rank=rank, distributed_init_method=f"file://{rendezvous}"
        )
        state.initialize_model_parallel(
            data_parallel_size=parallel.data_parallel_size,
            cfg_parallel_size=parallel.cfg_parallel_size,
            sequence_parallel_size=parallel.sequence_parallel_size,
            ulysses_degree=parallel.ulysses_degree,
            ring_degree=parallel.ring_degree,
            allgather_degree=parallel.allgather_degree,
            tensor_parallel_size=parallel.tensor_parallel_size,
            fully_shard_degree=parallel.hsdp_shard_size if parallel.use_hsdp else 1,
            use_hsdp=parallel.use_hsdp,
        )
        yield config
