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

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.platforms import current_platform
from vllm_omni.diffusion.distributed.cfg_parallel import CFGParallelMixin
from vllm_omni.diffusion.distributed.parallel_state import (
    get_classifier_free_guidance_rank,
    get_classifier_free_guidance_world_size,
    is_cfg_group_initialized,
)

from port_kit.parallel.comm.symm_mem import is_enabled
from port_kit.upstream.checks import require

if TYPE_CHECKING:
    from torch import Tensor
    from vllm_omni.diffusion.data import OmniDiffusionConfig

require("cfg_mixin")

#: Argument of a branch that names the transformer which runs it, an attribute of the pipeline. All branches of a step
#: have the same one; the default is ``transformer``.
EXPERT = "expert"
#: Method that combines the predictions of all branches.
COMBINE = "combine_multi_branch_cfg_noise"


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
    list. The base mixin assigns branches to ranks, gathers and combines them.

    Attributes:
        batches_branches: False if the transformer does not accept ``extra_branches``; its branches run one by one.
    """

    batches_branches: ClassVar[bool] = True
    od_config: OmniDiffusionConfig

    def predict_noise_with_multi_branch_cfg(
        self,
        do_true_cfg: bool,
        true_cfg_scale: float | dict[str, float],
        branches_kwargs: list[dict[str, Any]],
        cfg_normalize: bool = False,
        output_slice: int | None = None,
        **options: Any,
    ) -> Any:
        """Guide as the base mixin, with this rank's branches in one call if that has a benefit.

        Args:
            do_true_cfg: False to run the first branch only.
            true_cfg_scale: passed to ``combine_multi_branch_cfg_noise``.
            branches_kwargs: arguments of the transformer per branch, the complete one first.
            cfg_normalize: passed to ``combine_multi_branch_cfg_noise``.
            output_slice: length of the predictions to keep, in their second dimension; None for all.
            options: further arguments of the base mixin: ``combine_fn`` in vLLM-Omni 0.32.
        """
        if do_true_cfg and self.batches_branches and should_batch_branches(self.od_config):
            branches_kwargs = self._run_own_branches(branches_kwargs)
        return super().predict_noise_with_multi_branch_cfg(
            do_true_cfg, true_cfg_scale, branches_kwargs, cfg_normalize, output_slice, **options
        )

    def predict_guided(
        self, scales: dict[str, float], branches: list[dict[str, Any]], *, first_only: bool = False
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the guided prediction, and that of the first branch, on every rank.

        Args:
            scales: passed to ``combine_multi_branch_cfg_noise``.
            branches: arguments of the transformer per branch, the complete one first.
            first_only: run the first branch alone, on every rank, without guidance.
        """
        if first_only:
            only = _tensors(self.predict_noise_with_multi_branch_cfg(False, scales, branches))
            return only, only
        firsts: list[Any] = []
        combine = getattr(self, COMBINE)

        def note_first(predictions: list[Any], *args: Any, **options: Any) -> Any:
            firsts.append(predictions[0])
            return combine(predictions, *args, **options)

        setattr(self, COMBINE, note_first)
        try:
            guided = self.predict_noise_with_multi_branch_cfg(True, scales, branches)
        finally:
            delattr(self, COMBINE)
        (first,) = firsts
        return _tensors(guided), _tensors(first)

    def predict_noise(self, *, predicted: Any = None, **branch: Any) -> Any:
        """Run one branch; return ``predicted`` if it ran in one call with others."""
        return self._run(branch) if predicted is None else predicted

    def _run(self, first: Mapping[str, Any], *others: Mapping[str, Any]) -> Any:
        """Run branches with the transformer that they name."""
        name = first.get(EXPERT, "transformer")
        own, *further = ({key: value for key, value in branch.items() if key != EXPERT} for branch in (first, *others))
        options = {"extra_branches": further} if further else {}
        return getattr(self, name)(**own, **options)

    def _run_own_branches(self, branches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Run this rank's branches in one call, if it has several.

        Returns:
            Arguments of :meth:`predict_noise` per branch.
        """
        own = _local_branches(len(branches))
        if len(own) < 2:
            return branches
        first, *others = (branches[index] for index in own)
        predicted = dict(zip(own, self._run(first, *others), strict=True))
        return [{"predicted": predicted[i]} if i in predicted else branch for i, branch in enumerate(branches)]


def _tensors(prediction: Any) -> tuple[Tensor, ...]:
    return prediction if isinstance(prediction, tuple) else (prediction,)


def _local_branches(count: int) -> range:
    """Return the branches of this rank; vLLM-Omni assigns them round-robin."""
    if not is_cfg_group_initialized():
        return range(count)
    return range(get_classifier_free_guidance_rank(), count, get_classifier_free_guidance_world_size())
