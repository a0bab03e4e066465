"""A world of one process: build and run vLLM-Omni modules without an engine.

vLLM's linears and vLLM-Omni's ``Attention`` read process groups, two configurations and a forward context while they
are built and while they run. :func:`single_rank` provides all of them::

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

if TYPE_CHECKING:
    from vllm_omni.diffusion.data import OmniDiffusionConfig


@contextmanager
def single_rank(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", *, default_device: bool = True
) -> Iterator[OmniDiffusionConfig]:
    """Make this process a world of one rank for as long as the context lasts.

    Inside, ``dtype`` is the default dtype of new parameters and ``device`` the default device; an inner
    ``torch.device(...)`` overrides the latter. Contexts may be nested: an inner one shares the groups of the outer.

    Args:
        dtype: floating dtype, also the one in the diffusion configuration.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:N"`` or ``"meta"``.
        default_device: whether ``device`` becomes the default one. It costs every call of torch some Python, which
            an engine does not have while it runs.

    Yields:
        The ``OmniDiffusionConfig`` that modules see.

    Raises:
        ParallelError: this process is already one rank of a larger world.
    """
    from vllm.config import set_current_vllm_config
    from vllm_omni.diffusion.config import set_current_diffusion_config
    from vllm_omni.diffusion.data import OmniDiffusionConfig
    from vllm_omni.diffusion.forward_context import set_forward_context
    from vllm_omni.diffusion.vllm_config import create_diffusion_vllm_config

    device = torch.device(device)
    # A folder that exists: any other name would be looked up, and offline that ends in an error.
    config = OmniDiffusionConfig(model=str(Path(__file__).parent), dtype=dtype)
    host = torch.device("cpu") if device.type == "meta" else device
    vllm_config = create_diffusion_vllm_config(host, config)
    with ExitStack() as stack:
        stack.enter_context(set_current_vllm_config(vllm_config))
        stack.enter_context(_world_of_one())
        stack.enter_context(set_current_diffusion_config(config))
        stack.enter_context(set_forward_context(vllm_config=vllm_config, omni_diffusion_config=config))
        stack.enter_context(_default_dtype(dtype))
        if default_device:
            stack.enter_context(device)
        yield config


@contextmanager
def _world_of_one() -> Iterator[None]:
    """Open the distributed groups with one rank, rendezvous through a file; keep those that are already open."""
    from vllm_omni.diffusion.distributed import parallel_state as state

    if state.model_parallel_is_initialized():
        _require_one(torch.distributed.get_world_size())
        yield
        return
    hook = sys.excepthook  # torch.distributed puts a rank in front of every traceback from here on
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
            f"this process is one of {world_size} ranks; single_rank needs a process of its own",
            code="parallel_world",
            hint="call it outside of workers, or use port_kit.testing.workers for several ranks",
        )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
