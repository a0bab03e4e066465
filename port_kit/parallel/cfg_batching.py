"""All guidance passes of a rank in one call of the transformer, where that saves time.

The passes of a guided step do not depend on each other. Two things are gained by giving a transformer all of them:

* Under HSDP or layerwise offload a block's weights are gathered, or copied from the host, at each call of the block. A
  block that is given all passes in one call has them brought in once a step.
* Where the ranks of a host share each pass, one pass computes while what they send of another is on its way
  (:mod:`~port_kit.parallel.comm.stream_interleave`).

A pipeline gets it from :class:`BatchedCFGMixin`, in the place of vLLM-Omni's ``CFGParallelMixin``. Its transformer
takes further passes as ``extra_branches``; where :func:`weights_are_streamed`, its blocks take all passes in one call::

    class MyTransformer(nn.Module):
        def forward(self, x, extra_branches=()):  # arguments of further passes, for which a list is returned
            states = [self.begin(x), *(self.begin(**other) for other in extra_branches)]
            for block in self.blocks:
                states = block(states)
            ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform
from vllm_omni.diffusion.distributed.cfg_parallel import CFGParallelMixin
from vllm_omni.diffusion.distributed.parallel_state import (
    get_classifier_free_guidance_rank,
    get_classifier_free_guidance_world_size,
    is_cfg_group_initialized,
)

from port_kit.parallel.comm.symm_mem import is_enabled

if TYPE_CHECKING:
    from vllm_omni.diffusion.data import OmniDiffusionConfig


def weights_are_streamed(config: OmniDiffusionConfig | None) -> bool:
    """Whether a block's weights are on the device only while it runs; False outside of an engine."""
    return config is not None and (config.parallel_config.use_hsdp or config.enable_layerwise_offload)


def overlaps_communication(config: OmniDiffusionConfig) -> bool:
    """Whether the GPUs of an engine divide the tokens or the heads of a pass, and may write to each other's memory."""
    parallel = config.parallel_config
    divided = max(parallel.sequence_parallel_size, parallel.tensor_parallel_size) > 1
    return divided and current_platform.is_cuda() and is_enabled()


def should_batch_branches(config: OmniDiffusionConfig) -> bool:
    """Whether an engine's transformer should be given all passes of a rank in one call.

    Each pass then keeps its tokens until all are done, so that is left where nothing is gained, as on one GPU. Caches
    compare a call with the call before, so with a cache each call is one pass.
    """
    gains = weights_are_streamed(config) or overlaps_communication(config)
    return gains and config.cache_backend in (None, "", "none")


class BatchedCFGMixin(CFGParallelMixin):
    """vLLM-Omni's guidance mixin, with the passes of a rank given to the transformer together where that saves time.

    The transformer's ``forward`` takes ``extra_branches``, the arguments of further passes, and returns a list where
    there are any; see the module's head. Which passes a rank makes, and how they are combined, is the mixin's.
    """

    od_config: OmniDiffusionConfig
    transformer: Any

    def predict_noise_with_multi_branch_cfg(
        self,
        do_true_cfg: bool,
        true_cfg_scale: float | dict[str, float],
        branches_kwargs: list[dict[str, Any]],
        cfg_normalize: bool = False,
        output_slice: int | None = None,
    ) -> Any:
        """Make this rank's passes together if they should be, then do as vLLM-Omni does."""
        branches = list(branches_kwargs)
        own = _local_branches(len(branches))
        if do_true_cfg and len(own) > 1 and should_batch_branches(self.od_config):
            predicted = self.predict_branches([branches[index] for index in own])
            for index, flows in zip(own, predicted, strict=True):
                branches[index] = {"predicted": flows}
        return super().predict_noise_with_multi_branch_cfg(
            do_true_cfg, true_cfg_scale, branches, cfg_normalize, output_slice
        )

    def predict_noise(self, *, predicted: Any = None, **branch: Any) -> Any:
        """Run one pass, unless it has been run together with others."""
        return self.transformer(**branch) if predicted is None else predicted

    def predict_branches(self, branches: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Run several passes in one call of the transformer."""
        return self.transformer(**branches[0], extra_branches=branches[1:])


def _local_branches(branches: int) -> range:
    """Return the passes that fall to this rank, as vLLM-Omni deals them out: in turns."""
    if not is_cfg_group_initialized():
        return range(branches)
    return range(get_classifier_free_guidance_rank(), branches, get_classifier_free_guidance_world_size())
