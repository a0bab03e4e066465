"""HSDP from the first byte: blocks become shards before their weights are read, so no rank ever holds a whole model.

vLLM-Omni loads a whole transformer on every rank and shards it afterwards. A port that wraps the making of its blocks
in :func:`meta_blocks` and calls :func:`shard_before_loading` at the head of ``load_weights`` loads into
shards instead: at any time a rank holds its own part of the blocks, what is outside of them, and one tensor of the
checkpoint. vLLM-Omni then finds the blocks sharded and does the rest as ever. ::

    with meta_blocks():
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
    ...
    def load_weights(self, weights):
        shard_before_loading(self.transformer, self.od_config, self.device)
        return load_weights(self.transformer, weights, RULES)

Quantized models and ``enable_broadcast_weight_load`` keep vLLM-Omni's way: their weights change, or are sent, while
they are whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from port_kit.parallel.memory import materialize
from port_kit.regions import Region
from port_kit.targets import Target, read_targets

if TYPE_CHECKING:
    from vllm_omni.diffusion.data import OmniDiffusionConfig

#: What vLLM-Omni is given to shard where all blocks are shards already: it refuses to shard nothing.
REMAINDER = "hsdp_remainder"


def shards_on_load(config: OmniDiffusionConfig | None) -> bool:
    """Whether an engine with this configuration loads into shards; False outside of an engine."""
    if config is None or not config.parallel_config.use_hsdp:
        return False
    return config.quantization_config is None and not getattr(config, "enable_broadcast_weight_load", False)


def meta_blocks() -> AbstractContextManager[object]:
    """Return the device context to make blocks in: meta where they are going to be shards, else the current one."""
    from vllm_omni.diffusion.config import get_current_diffusion_config_or_none

    return torch.device("meta") if shards_on_load(get_current_diffusion_config_or_none()) else nullcontext()


@torch.no_grad()
def shard_before_loading(transformer: nn.Module, config: OmniDiffusionConfig, device: torch.device) -> None:
    """Shard a transformer's blocks and give each shard memory; nothing where :func:`shards_on_load` says no.

    Every parameter of a block gets a ``weight_loader`` that takes whole tensors (or whole slots of a fused one) and
    keeps this rank's rows. Every rank must call this, at the same point.

    Args:
        transformer: declares ``_hsdp_shard_conditions``, and ``_hsdp_ignored_modules`` if it has any; its blocks were
            made within :func:`meta_blocks`.
        config: the engine's.
        device: where the shards go.
    """
    if not shards_on_load(config):
        return
    targets = read_targets(transformer).targets
    ignored = _ignored_parameters(transformer)
    blocks = _blocks(transformer)
    if blocks:
        mesh = _mesh(config)
        policy = _policy(transformer, config)
        for block in reversed(blocks):
            fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=ignored & set(block.parameters()))
        _add_remainder(transformer)
    materialize(transformer, device)
    for name, parameter in transformer.named_parameters():
        if isinstance(parameter, DTensor):
            _accept_full_tensors(parameter, targets[name])


def _blocks(transformer: nn.Module) -> list[nn.Module]:
    conditions = getattr(transformer, "_hsdp_shard_conditions", None) or ()
    return [
        module
        for name, module in transformer.named_modules()
        if any(condition(name, module) for condition in conditions)
    ]


def _ignored_parameters(transformer: nn.Module) -> set[nn.Parameter]:
    """Parameters that stay whole: of the modules that the transformer names, and those that FSDP cannot shard."""
    paths = getattr(transformer, "_hsdp_ignored_modules", None) or ()
    named = {parameter for path in paths for parameter in transformer.get_submodule(path).parameters()}
    return named | {p for p in transformer.parameters() if p.ndim == 0 or not p.is_floating_point()}


def _mesh(config: OmniDiffusionConfig) -> DeviceMesh:
    """Rows of the mesh are shard groups, as in vLLM-Omni."""
    from vllm_omni.platforms import current_omni_platform

    parallel = config.parallel_config
    shape = (parallel.hsdp_replicate_size, parallel.hsdp_shard_size)
    return init_device_mesh(current_omni_platform.device_type, shape, mesh_dim_names=("replicate", "shard"))


def _policy(transformer: nn.Module, config: OmniDiffusionConfig) -> MixedPrecisionPolicy:
    """vLLM-Omni's: parameters are used in the engine's dtype unless the transformer wants its own kept."""
    keep = bool(getattr(transformer, "_hsdp_preserve_parameter_dtypes", False))
    return MixedPrecisionPolicy(param_dtype=None if keep else config.dtype, cast_forward_inputs=False)


def _add_remainder(transformer: nn.Module) -> None:
    """Let vLLM-Omni's own step, which comes after loading, take what is outside of the blocks."""
    transformer.add_module(REMAINDER, nn.Identity())
    transformer._hsdp_shard_conditions = [lambda name, _module: name == REMAINDER]  # type: ignore[assignment]


def _accept_full_tensors(parameter: Tensor, whole: Target) -> None:
    """Let a shard be written as the parameter that it is part of."""
    for name in ("output_dim", "input_dim"):  # by these a fused parameter's slots are known
        dim = getattr(whole.tensor, name, None)
        if dim is not None:
            setattr(parameter, name, dim)
    parameter.weight_loader = RowWriter(whole.spec.slots)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class RowWriter:
    """The ``weight_loader`` of a shard: takes whole tensors, keeps this rank's rows.

    Attributes:
        slots: where each slot of a fused parameter stands in the whole one; empty for plain parameters.
    """

    slots: Mapping[str, Region]

    @torch.no_grad()
    def __call__(self, parameter: DTensor, piece: Tensor, slot: str | int = "") -> None:
        """Write this rank's rows of ``piece``, the whole parameter or a whole slot of it."""
        local = parameter.to_local()
        mesh = parameter.device_mesh
        rows, ranks = parameter.shape[0], mesh.size(-1)
        start = min(-(-rows // ranks) * mesh.get_local_rank(mesh.ndim - 1), rows)  # as torch.chunk cuts
        first, last = self.slots[str(slot)][0] if slot != "" else (0, rows)
        low, high = max(start, first), min(start + local.shape[0], last)
        if low < high:
            local[low - start : high - start].copy_(piece[low - first : high - first])
