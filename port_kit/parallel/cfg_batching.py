"""Batching of a rank's CFG branches into one transformer call.

The branches of a guided step are independent. One call for all of them has two benefits:

* Under HSDP or layerwise offload, a block's weights are gathered or copied once per step instead of once per branch.
* If ranks share each branch, one branch computes while another communicates
  (:mod:`~port_kit.parallel.comm.stream_interleave`).

A pipeline derives from :class:`BatchedCFGMixin` instead of vLLM-Omni's ``CFGParallelMixin``. Its transformer accepts
further branches as ``extra_branches``. If :func:`weights_are_streamed`, its blocks accept all branches in one call::

    class MyTransformer(nn.Module):
        def forward(self, x, extra_branches=()):  # arguments of further branches; with any, returns a list
            states = [self.begin(x), *(self.begin(**branch) for branch in extra_branches)]
            for block in self.blocks:
                states = block(states)
            ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.platforms import current_platform
from vllm_omni.diffusion.distributed.cfg_parallel import CFGParallelMixin
from vllm_omni.diffusion.distributed.parallel_state import (
    get_cfg_group,
    get_classifier_free_guidance_rank,
    get_classifier_free_guidance_world_size,
    is_cfg_group_initialized,
)

from port_kit.parallel.comm.symm_mem import is_enabled
from port_kit.upstream.checks import require

if TYPE_CHECKING:
    from vllm_omni.diffusion.data import OmniDiffusionConfig

require("cfg_mixin")


def weights_are_streamed(config: OmniDiffusionConfig | None) -> bool:
    """Return True if a block's weights are on the device only while it runs; False outside of an engine."""
    return config is not None and (config.parallel_config.use_hsdp or config.enable_layerwise_offload)


def overlaps_communication(config: OmniDiffusionConfig) -> bool:
    """Return True if GPUs divide a branch's tokens or heads and symmetric memory is enabled."""
    parallel = config.parallel_config
    divided = max(parallel.sequence_parallel_size, parallel.tensor_parallel_size) > 1
    return divided and current_platform.is_cuda() and is_enabled()


def should_batch_branches(config: OmniDiffusionConfig) -> bool:
    """Return True if the transformer should run all branches of a rank in one call.

    Batching keeps the tokens of all branches in memory, so it is off if it has no benefit, as on one GPU. Step caches
    compare consecutive calls, so it is also off with a cache.
    """
    gains = weights_are_streamed(config) or overlaps_communication(config)
    return gains and config.cache_backend in (None, "", "none")


class BatchedCFGMixin(CFGParallelMixin):
    """vLLM-Omni's guidance mixin with batching of a rank's branches.

    The transformer's ``forward`` accepts ``extra_branches``, the arguments of further branches. With any, it returns a
    list. Branches are assigned to ranks as in the base mixin, and gathered before they are combined.

    Attributes:
        batches_branches: False if the transformer does not accept ``extra_branches``; its branches run one by one.
    """

    batches_branches: ClassVar[bool] = True
    od_config: OmniDiffusionConfig
    transformer: Any

    def predict_noise_with_multi_branch_cfg(
        self,
        do_true_cfg: bool,
        true_cfg_scale: float | dict[str, float],
        branches_kwargs: list[dict[str, Any]],
        cfg_normalize: bool = False,
        output_slice: int | None = None,
        **options: Any,
    ) -> Any:
        """Guide with this rank's branches in one call if that has a benefit, else as the base mixin.

        ``options`` are further ones of the base mixin (``combine_fn``); with them, it runs the branches.
        """
        count = len(branches_kwargs)
        is_batched = self.batches_branches and do_true_cfg and output_slice is None and count > _cfg_ranks()
        if options or not is_batched or not should_batch_branches(self.od_config):
            return super().predict_noise_with_multi_branch_cfg(
                do_true_cfg, true_cfg_scale, branches_kwargs, cfg_normalize, output_slice, **options
            )
        predicted = self.predict_branches([branches_kwargs[index] for index in _local_branches(count)])
        return self.combine_multi_branch_cfg_noise(_gather_branches(predicted, count), true_cfg_scale, cfg_normalize)

    def predict_noise(self, **branch: Any) -> Any:
        """Run one branch."""
        return self.transformer(**branch)

    def predict_branches(self, branches: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Run several branches in one call of the transformer; a single one by itself."""
        if len(branches) == 1:
            return [self.transformer(**branches[0])]
        predicted: list[Any] = self.transformer(**branches[0], extra_branches=branches[1:])
        return predicted


def _cfg_ranks() -> int:
    return get_classifier_free_guidance_world_size() if is_cfg_group_initialized() else 1


def _local_branches(count: int) -> range:
    """Return the branches of this rank; vLLM-Omni assigns them round-robin."""
    size = _cfg_ranks()
    return range(get_classifier_free_guidance_rank() if size > 1 else 0, count, size)


def _gather_branches(predicted: Sequence[Any], count: int) -> list[Any]:
    """Return the predictions of all branches in order, from those of this rank.

    Args:
        predicted: per branch of this rank, a tensor or a tuple of tensors.
        count: branches of all ranks, more than there are ranks.
    """
    size = _cfg_ranks()
    if size == 1:
        return list(predicted)
    is_tuple = isinstance(predicted[0], tuple)
    rows = [prediction if is_tuple else (prediction,) for prediction in predicted]
    rows += [rows[0]] * (-(-count // size) - len(rows))  # ranks with fewer branches take part in every gather
    group = get_cfg_group()
    gathered = [[group.all_gather(part.contiguous(), separate_tensors=True) for part in row] for row in rows]
    found = [tuple(parts[index % size] for parts in gathered[index // size]) for index in range(count)]
    return list(found) if is_tuple else [parts[0] for parts in found]
