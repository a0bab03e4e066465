"""Streams and attention calls of a plan on the ranks of an engine."""

from __future__ import annotations

from torch import nn
from vllm_omni.diffusion.distributed.parallel_state import get_sp_group
from vllm_omni.diffusion.forward_context import get_forward_context

from port_kit.autoparallel.boundaries import ShardedModel, shard_tokens
from port_kit.autoparallel.exchange import GroupExchange
from port_kit.autoparallel.omni_attention import OmniKernel
from port_kit.autoparallel.plan import Plan


def apply_tokens(model: nn.Module, plan: Plan) -> ShardedModel:
    """Shard token streams over the sequence-parallel ranks of this engine, and attend with its backend.

    With one such rank, only the attention backend changes. It needs a forward context
    (``vllm_omni.diffusion.forward_context``), of which it reads the degrees.

    Raises:
        ParallelError: ``plan_pattern``; the module lacks what the plan names.
    """
    parallel = get_forward_context().omni_diffusion_config.parallel_config
    group = get_sp_group().device_group if (parallel.sequence_parallel_size or 1) > 1 else None
    if group is not None:
        # vLLM-Omni looks for a plan of its own hooks, and warns without one: an empty one needs no hooks
        model._sp_plan = {}  # type: ignore[assignment]
    return shard_tokens(model, plan, GroupExchange(group), OmniKernel())
