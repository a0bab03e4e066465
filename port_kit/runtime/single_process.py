"""Process groups of one rank, to build and run vLLM-Omni modules without an engine.

vLLM's linears and vLLM-Omni's ``Attention`` read process groups, two configurations and a forward context.
:func:`single_rank` provides all of them::

    with single_rank(dtype=torch.float32):
        transformer = build_transformer(config)

    with single_rank(), torch.device("meta"):          # names and shapes only, no memory
        manifest = Manifest.from_module(build_transformer(TRANSFORMER_CONFIG))
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from port_kit.errors import ParallelError
from port_kit.upstream.checks import require

if TYPE_CHECKING:
    from vllm_omni.diffusion.data import OmniDiffusionConfig


@contextmanager
def single_rank(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", *, default_device: bool = True
) -> Iterator[OmniDiffusionConfig]:
    """Initialize process groups of one rank within the context.

    ``dtype`` is the default dtype of new parameters and ``device`` the default device. A nested ``torch.device(...)``
    overrides the latter. Nested contexts share the process groups.

    Args:
        dtype: floating dtype, also of the diffusion configuration.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:N"`` or ``"meta"``.
        default_device: make ``device`` the default device. This adds Python overhead to each torch call, which an
            engine does not have.

    Yields:
        The ``OmniDiffusionConfig`` of the context.

    Raises:
        ParallelError: ``parallel_world``; this process is one of several ranks.
    """
    from vllm.config import set_current_vllm_config
    from vllm_omni.diffusion.config import set_current_diffusion_config
    from vllm_omni.diffusion.data import OmniDiffusionConfig
    from vllm_omni.diffusion.forward_context import set_forward_context
    from vllm_omni.diffusion.vllm_config import create_diffusion_vllm_config

    require("process_groups")
    device = torch.device(device)
    # an existing folder: other names are looked up on the Hub, which fails offline
    config = OmniDiffusionConfig(model=str(Path(__file__).parent), dtype=dtype)
    host = torch.device("cpu") if device.type == "meta" else device
    vllm_config = create_diffusion_vllm_config(host, config)
    with ExitStack() as stack:
        stack.enter_context(set_current_vllm_config(vllm_config))
        stack.enter_context(_single_rank_groups())
        stack.enter_context(set_current_diffusion_config(config))
        stack.enter_context(set_forward_context(vllm_config=vllm_config, omni_diffusion_config=config))
        stack.enter_context(_default_dtype(dtype))
        if default_device:
            stack.enter_context(device)
        yield config


@contextmanager
def _single_rank_groups() -> Iterator[None]:
    """Initialize process groups of one rank with a file rendezvous, or reuse those of this process."""
    from vllm_omni.diffusion.distributed import parallel_state as state

    if state.model_parallel_is_initialized():
        _require_one(torch.distributed.get_world_size())
        yield
        return
    hook = sys.excepthook  # torch.distributed replaces it to prefix tracebacks with the rank
    with tempfile.TemporaryDirectory(prefix="port-kit-") as folder:
        rendezvous = f"file://{Path(folder) / 'rendezvous'}"
        state.init_distributed_environment(world_size=1, rank=0, local_rank=0, distributed_init_method=rendezvous)
        try:
            _require_one(torch.distributed.get_world_size())
            state.initialize_model_parallel(data_parallel_size=1, sequence_parallel_size=1)
            yield
        finally:
            state.destroy_model_parallel()
            state.destroy_distributed_environment()
            sys.excepthook = hook


def _require_one(world_size: int) -> None:
    if world_size != 1:
        raise ParallelError(
            f"single_rank: expected a process without other ranks, got a world of {world_size} ranks.",
            code="parallel_world",
            hint="call it outside of workers; for several ranks use port_kit.testing.workers",
        )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
